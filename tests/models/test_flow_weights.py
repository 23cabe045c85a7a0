"""Weights of mixtures and of data, from log densities."""

import math

import pytest
import torch

from pyroboost.compose._line_search import best_weight, mean_and_error, slope_at_zero, tempered
from pyroboost.models._flow_weights import nearest, solve_weights

DOUBLE = torch.float64


def test_the_weights_solve_their_problem():
    """At the maximum the mean of g_c / q is 1 for what has weight, and at most 1 for the rest."""
    logs = torch.randn(200, 4, dtype=DOUBLE)
    logs[:, 3] -= 3.0
    v = torch.rand(200, dtype=DOUBLE)
    w = solve_weights(dict(enumerate(logs.T)), torch.full((4,), 0.25), v, max_iterations=5000)
    q = (logs + w.log()).logsumexp(-1, keepdim=True)
    slopes = (v / v.sum()) @ (logs - q).exp()
    assert float(w.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(slopes[w > 0], torch.ones(int((w > 0).sum()), dtype=DOUBLE),
                               atol=1e-2, rtol=0)  # fmt: skip
    assert (slopes[w == 0] <= 1 + 1e-2).all()
    assert float(w[3]) == 0.0


def test_the_nearest_are_a_share_around_one_of_them():
    x = torch.randn(100, 2)
    weights = torch.zeros(100)
    weights[7] = 1.0
    mask = nearest(x, weights, 0.1)
    distance = (x - x[7]).norm(dim=-1)
    assert int(mask.sum()) == 10
    assert distance[mask].max() < distance[~mask].min()


def test_weights_in_line_search_temper_and_slope_are_repetitions():
    log_q, log_m = torch.randn(30, dtype=DOUBLE), torch.randn(30, dtype=DOUBLE)
    times = torch.randint(1, 5, (30,))
    q, m = (t.repeat_interleave(times, 0) for t in (log_q, log_m))
    assert best_weight(log_q, log_m, times.double()) == pytest.approx(best_weight(q, m))
    weighted = slope_at_zero(log_q, log_m, weights=times.double())
    plain = slope_at_zero(q, m)
    assert weighted.ratio == pytest.approx(plain.ratio)
    assert weighted.near == pytest.approx(plain.near)
    one, many = tempered(log_q, 0.0, weights=times.double()), tempered(q, 0.0)
    first = torch.cat([torch.zeros(1, dtype=torch.long), times.cumsum(0)[:-1]])
    expected = many.weights[first] * times / len(q) * 30
    torch.testing.assert_close(one.weights, expected.to(one.weights))
    alike = slope_at_zero(log_q, log_m, weights=torch.ones(30))
    assert alike.ratio_error == pytest.approx(slope_at_zero(log_q, log_m).ratio_error, rel=0.05)


def test_weights_that_have_no_solution_stay():
    table = {0: torch.tensor([0.0, math.nan]), 1: torch.tensor([0.0, 0.0])}
    assert solve_weights(table, torch.tensor([0.3, 0.7])).tolist() == pytest.approx([0.3, 0.7])


def test_the_error_of_a_weighted_mean_is_that_of_a_ratio():
    """Over many samples, the mean's spread is the error that each sample states."""
    torch.manual_seed(0)
    v = torch.rand(2000, 300, dtype=DOUBLE).exp()
    x = torch.randn(2000, 300, dtype=DOUBLE) + 3
    found = [mean_and_error(row, w) for row, w in zip(x, v, strict=True)]
    means, errors = torch.tensor(found, dtype=DOUBLE).T
    assert float(means.std()) == pytest.approx(float(errors.mean()), rel=0.07)
    alike = mean_and_error(x[0], v[0] * 0 + 2)
    assert alike == pytest.approx(mean_and_error(x[0]), rel=2e-3)
