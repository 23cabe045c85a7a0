"""Likelihoods never mix their kinds silently."""

import math

import pytest
import torch

from pyroboost import Likelihood
from pyroboost.likelihood import weakest


def test_the_weakest_kind_wins():
    kinds = ["exact", "bound", "estimate", "unnormalised"]
    for i, a in enumerate(kinds):
        for j, b in enumerate(kinds):
            assert weakest(a, b) == kinds[max(i, j)]


def test_mean_and_error():
    """Spread over data over root N, and a shared error that does not average out."""
    value = torch.tensor([1.0, 2.0, 3.0, 6.0])
    one = Likelihood(value, "exact")
    assert one.mean == 3.0
    assert one.standard_error == pytest.approx(float(value.double().std()) / 2)
    shared = Likelihood(value, "estimate", shared_error=2.0)
    assert shared.standard_error == pytest.approx(math.hypot(one.standard_error, 2.0))
    assert math.isnan(Likelihood(value[:1], "exact").standard_error)


def test_cat_and_add():
    parts = [
        Likelihood(torch.zeros(2), "exact"),
        Likelihood(torch.ones(3), "estimate", std_error=torch.ones(3), shared_error=0.5),
    ]
    both = Likelihood.cat(parts)
    assert (len(both), both.kind, both.shared_error) == (5, "estimate", 0.5)
    assert both.std_error.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert (both + 1.0).mean == both.mean + 1.0
    with pytest.raises(ValueError, match="no block to join"):
        Likelihood.cat([])


def test_words():
    text = Likelihood(torch.tensor([-1.0, -2.0]), "bound", num_samples=7).describe()
    assert text == "-1.50 ± 0.50 nats (lower bound, 7 samples)"
    with pytest.raises(ValueError, match="it must be one of exact, bound"):
        Likelihood(torch.zeros(1), "guess")


def test_blocks_of_which_some_were_sampled_keep_their_errors():
    sampled = Likelihood(torch.zeros(2), "estimate", std_error=torch.tensor([0.1, 0.2]))
    joined = Likelihood.cat([Likelihood(torch.ones(1), "exact"), sampled])
    assert joined.kind == "estimate"
    torch.testing.assert_close(joined.std_error, torch.tensor([0.0, 0.1, 0.2]))
