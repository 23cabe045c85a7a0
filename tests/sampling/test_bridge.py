"""Bridges and annealed paths against ratios of constants that are known."""

import math

import pytest
import torch

from pyroboost.sampling import log_mean_exp
from pyroboost.sampling.bridge import bridge_log_ratio
from pyroboost.sampling.metropolis import flip_gibbs, random_walk
from pyroboost.sampling.paths import annealed_path


def normal_ratio(x, loc, scale, log_z):
    """log of an unnormalised N(loc, scale^2) with constant Z over N(0, 1)."""
    log_q = -0.5 * ((x - loc) / scale) ** 2 - math.log(scale) + log_z
    return log_q + 0.5 * x**2


def bridged(count, loc=1.0, scale=0.7, log_z=3.0, generator=None):
    target = loc + scale * torch.randn(count, generator=generator, dtype=torch.float64)
    proposal = torch.randn(2 * count, generator=generator, dtype=torch.float64)
    at = [normal_ratio(x, loc, scale, log_z) for x in (target, proposal)]
    return bridge_log_ratio(*at)


def test_bridge_finds_the_constant_and_its_error_covers_it():
    found = [bridged(400) for _ in range(200)]
    values = torch.tensor([b.value for b in found])
    errors = torch.tensor([b.std_error for b in found])
    assert all(b.converged for b in found)
    assert float(values.mean()) == pytest.approx(3.0, abs=5 * float(values.std()) / 200**0.5)
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.2)
    assert 0.88 < float(((values - 3.0).abs() < 2 * errors).double().mean()) <= 1.0


def test_bridge_beats_the_importance_sample_of_the_same_draws():
    """Towards a proposal that is too narrow, importance weights have no variance."""
    bridge, plain = [], []
    for _ in range(100):
        target = 3.0 * torch.randn(400, dtype=torch.float64)
        proposal = torch.randn(400, dtype=torch.float64)
        at = [normal_ratio(x, 0.0, 3.0, 0.0) for x in (target, proposal)]
        bridge.append(bridge_log_ratio(*at).value)
        plain.append(float(log_mean_exp(at[1]).value))
    assert torch.tensor(bridge).square().mean() < 0.3 * torch.tensor(plain).square().mean()


def test_bridge_counts_draws_of_a_chain_as_what_they_are_worth():
    at = torch.randn(400).double(), torch.randn(400).double()
    alone, chain = bridge_log_ratio(*at), bridge_log_ratio(*at, effective=40.0)
    assert chain.value == alone.value
    assert alone.std_error < chain.std_error < 4 * alone.std_error
    assert chain.ess == pytest.approx(alone.ess / 10, rel=0.5)


def test_laws_that_do_not_overlap_are_seen():
    target = 30.0 + torch.randn(400, dtype=torch.float64)
    proposal = torch.randn(400, dtype=torch.float64)
    apart = bridge_log_ratio(*(normal_ratio(x, 30.0, 1.0, 0.0) for x in (target, proposal)))
    assert apart.ess < 5


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.tensor([math.nan]), torch.zeros(2, 2)])
def test_bridge_refuses_what_it_cannot_average(bad):
    with pytest.raises(ValueError, match="one log ratio per draw"):
        bridge_log_ratio(bad, torch.zeros(3))


SCHEDULE = torch.linspace(0, 1, 12)


def test_annealed_weights_of_bits_average_to_the_ratio_of_constants():
    """E[w] = Z_target / Z_start on the natural scale, within 5 standard errors."""
    table = torch.tensor([0.5, -1.0, 3.0, 1.5, -0.3, 0.8, -4.2, 0.1])
    number = lambda x: (x * 2 ** torch.arange(3)).sum(-1).long()  # noqa: E731
    terms = lambda x: torch.stack([torch.zeros(len(x)), table[number(x)]])  # noqa: E731

    def move(state, held, powers):
        walk = flip_gibbs(state, terms, powers, current=held)
        return walk.state, walk.terms

    start, end = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    bits = torch.randint(2, (4000, 3)).float()
    path = annealed_path(bits, terms, move, start=start, end=end, inverse_temperatures=SCHEDULE)
    weights = path.log_weights.exp()
    exact = float((2 * table).exp().sum()) / 8
    error = float(weights.std()) / 4000**0.5
    assert abs(float(weights.mean()) - exact) < 5 * error
    assert error < 0.05 * exact
    single = annealed_path(
        bits, terms, move, start=start, end=end, inverse_temperatures=torch.tensor([0.0, 1.0])
    )
    assert float(single.log_weights.exp().std()) > 2 * float(weights.std())
    torch.testing.assert_close(single.log_weights, 2 * table.double()[number(bits)])


def test_annealed_weights_of_reals_average_to_the_ratio_of_constants():
    def terms(x):
        square = x[:, 0].square()
        return torch.stack([-0.5 * square, -0.5 * (x[:, 0] - 2).square() / 0.25 + 1.0])

    def move(state, held, powers):
        walk = random_walk(state, terms, powers, scale=0.7, current=held, steps=2)
        return walk.state, walk.terms

    path = annealed_path(
        torch.randn(4000, 1),
        terms,
        move,
        start=torch.tensor([1.0, 0.0]),
        end=torch.tensor([0.0, 1.0]),
        inverse_temperatures=SCHEDULE,
    )
    weights = path.log_weights.exp()
    exact = 0.5 * math.e
    assert abs(float(weights.mean()) - exact) < 5 * float(weights.std()) / 4000**0.5
    assert path.state.shape == (4000, 1)


@pytest.mark.parametrize("bad", [[0.0, 0.5], [0.1, 1.0], [0.0, 0.7, 0.6, 1.0], [0.0]])
def test_paths_refuse_schedules_that_do_not_rise_from_0_to_1(bad):
    with pytest.raises(ValueError, match="rising from 0 to 1"):
        annealed_path(
            torch.zeros(2, 1),
            lambda x: torch.zeros(1, len(x)),
            lambda state, held, powers: (state, held),
            start=torch.zeros(1),
            end=torch.ones(1),
            inverse_temperatures=torch.tensor(bad),
        )
