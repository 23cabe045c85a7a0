"""Additive boosting: the second part finds what the first misses, and a useless one is refused."""

import math

import pytest
import torch

from pyroboost import Cascade
from pyroboost.compose import Mixture
from pyroboost.compose._additive import Growth, _Density, density_of
from pyroboost.compose._line_search import best_weight, slope_at_zero, tempered
from pyroboost.infer import additive
from pyroboost.likelihood import Likelihood
from pyroboost.models import GMM, RBM, VAE


def two_modes(n, share=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.rand(n, generator=generator) < share
    x = torch.randn(n, generator=generator)
    return torch.where(left, x - 4.0, x + 4.0)[:, None]


# The line search


@pytest.mark.parametrize("seed", range(5))
def test_line_search_against_a_grid(seed):
    generator = torch.Generator().manual_seed(seed)
    log_q = torch.randn(200, generator=generator).double() * 3
    log_m = torch.randn(200, generator=generator).double() * 3 - 0.5
    grid = torch.linspace(1e-4, 1 - 1e-4, 20_001, dtype=torch.float64)[:, None]
    values = torch.logaddexp((1 - grid).log() + log_q, grid.log() + log_m).mean(1)
    assert abs(best_weight(log_q, log_m) - grid[values.argmax()].item()) < 1e-4


def test_line_search_stops_at_its_ends():
    one = torch.zeros(10)
    assert best_weight(one, one - 1) == 0.0
    assert best_weight(one, one) == 0.0
    assert best_weight(one - 1, one) == 1.0
    # Densities that are 0 on one side: the share of each.
    q = torch.tensor([0.0, 0.0, 0.0, -math.inf])
    m = torch.tensor([-math.inf, -math.inf, -math.inf, 0.0])
    assert best_weight(q, m) == pytest.approx(0.25)
    assert best_weight(torch.tensor([0.0, -math.inf]), torch.tensor([0.0, -math.inf])) == 0.0
    neither = torch.tensor([0.0, -5.0, -math.inf])  # the last has no say
    assert best_weight(neither, neither[[1, 0, 2]]) == pytest.approx(0.5)
    assert best_weight(torch.tensor([-2000.0, 0.0]), torch.tensor([0.0, -2000.0])) == 0.5


def test_weights_of_data():
    log_q = torch.tensor([0.0, -1.0, -2.0, -3.0])
    found = tempered(log_q, 0.0)
    assert found.beta == 1.0
    assert torch.allclose(found.weights, torch.exp(-log_q) / torch.exp(-log_q).mean())
    assert found.ess == pytest.approx(
        float(torch.exp(-log_q).sum() ** 2 / torch.exp(-2 * log_q).sum()), rel=1e-6
    )
    soft = tempered(log_q, 0.9)
    assert 0.0 < soft.beta < 1.0
    assert soft.ess == pytest.approx(3.6, abs=1e-6)
    assert torch.allclose(soft.weights, (-soft.beta * log_q).softmax(0) * 4, atol=1e-6)
    far = tempered(-1000.0 * torch.arange(4.0), 0.5)
    assert torch.isfinite(far.weights).all()
    assert far.ess == pytest.approx(2.0, abs=1e-3)
    with pytest.raises(ValueError, match="the density of 1 data is 0"):
        tempered(torch.tensor([0.0, -math.inf]), 0.1)


def test_derivative_at_zero_is_that_of_the_likelihood():
    generator = torch.Generator().manual_seed(0)
    log_q, log_m = torch.randn(2, 500, generator=generator).double()
    w = 1e-6
    mixed = torch.logaddexp(log_q + math.log1p(-w), log_m + math.log(w))
    found = slope_at_zero(log_q, log_m)
    assert found.ratio - 1.0 == pytest.approx(float((mixed - log_q).mean() / w), rel=1e-3)
    ratios = (log_m - log_q).exp()
    assert found.ratio_error == pytest.approx(float(ratios.std()) / math.sqrt(500))
    assert found.near <= found.ratio - 1.0  # concave


def test_slope_says_no_to_a_part_that_is_as_good_by_chance_alone():
    """Useless parts of three kinds; the estimate's own noise must not pass for a gain."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, generator=generator).double()
    q = torch.distributions.Normal(0.0, 1.0).log_prob(x)
    for loc, scale in ((0.0, 1.0), (0.5, 1.0), (0.0, 0.5), (3.0, 1.0)):
        m = torch.distributions.Normal(loc, scale).log_prob(x)
        assert not slope_at_zero(q, m).positive
    noise = 0.6 * torch.randn(2, 4000, generator=generator).double() - 0.18
    assert slope_at_zero(q + noise[0], q + noise[1]).positive
    variance = math.expm1(0.36)
    assert not slope_at_zero(q + noise[0], q + noise[1], variance).positive


def test_slope_says_yes_where_the_ratios_have_heavy_tails():
    """A second mode far from the first: one huge ratio is the mean, but not the bounded slope."""
    q = torch.cat([torch.zeros(80), torch.full((20,), -80.0)])
    m = torch.cat([torch.full((80,), -80.0), -3.0 * torch.arange(20.0)])
    found = slope_at_zero(q, m)
    assert found.ratio < 2 * found.ratio_error
    assert found.near > 2 * found.near_error
    assert found.positive


def test_a_mixture_of_estimates_has_the_variance_of_the_delta_method():
    """(1 - w) q + w m with relative variances v and u; its logarithm is low by half of its own."""

    def at(density, variance):
        one = torch.tensor([density], dtype=torch.float64)
        return _Density(one.log(), torch.full_like(one, variance))

    found = at(0.2, 0.04).mixed(at(0.6, 0.09), 0.5)
    variance = (0.1**2 * 0.04 + 0.3**2 * 0.09) / 0.4**2
    assert found.variance.item() == pytest.approx(variance)
    assert found.corrected.item() == pytest.approx(math.log(0.4) + variance / 2)
    likelihood = Likelihood(torch.zeros(3), "estimate", torch.full((3,), 0.5), shared_error=0.3)
    assert torch.allclose(_Density.of(likelihood).variance, torch.tensor(0.16).double())


# Rounds


def test_second_part_finds_the_second_mode():
    x, held_out = two_modes(2000), two_modes(2000, seed=1)
    base = GMM(1, 1)
    base.mixture = base.mixture._replace(locs=torch.tensor([[-4.0]]), scale=torch.ones(1, 1, 1))
    mixture = Mixture(base, GMM(1, 1), weights=[1.0, 0.0])
    grown = additive(mixture, x, validation=held_out, start=1, ess=0.3, seed=0)
    (step,) = grown.rounds
    assert step.verdict == "grows"
    assert step.held_out
    assert step.kind == "exact"
    assert abs(mixture[1].mixture.locs.item() - 4.0) < 1.5
    assert grown.mixture is mixture
    assert abs(step.weight - 0.3) < 0.05
    before = base.log_marginal(held_out).value.detach()
    after = mixture.log_marginal(held_out).value.detach()
    ratios = (mixture[1].log_marginal(held_out).value.detach() - before).double().exp()
    assert step.slope.ratio == pytest.approx(float(ratios.mean()), rel=1e-3)
    assert step.before == pytest.approx(float(before.mean()), abs=1e-3)
    assert step.after == pytest.approx(float(after.mean()), abs=1e-3)
    assert step.gain == pytest.approx(step.after - step.before, abs=1e-6)
    spread = (after - before).double()
    assert step.gain_error == pytest.approx(float(spread.std()) / math.sqrt(2000), rel=1e-4)


def test_boosting_from_nothing_and_its_table():
    x, held_out = two_modes(1000, 0.9), two_modes(1000, 0.9, seed=1)
    grown = additive(
        Mixture(GMM(1, 1), GMM(1, 1), GMM(1, 1)), x, validation=held_out, stop=False, seed=0
    )
    assert [r.verdict for r in grown.rounds][:2] == ["base", "grows"]
    lines = grown.table().splitlines()
    assert len(lines) == 5
    assert "held-out" in lines[-1]
    assert "exact" in lines[-1]
    assert float(grown.mixture.weights.sum()) == pytest.approx(1.0)
    likelihoods = [r.after for r in grown.rounds]
    assert all(a >= b - 1e-9 for a, b in zip(likelihoods[1:], likelihoods[:-1], strict=True))
    assert likelihoods[-1] == pytest.approx(grown.mixture.log_marginal(held_out).mean, abs=1e-4)


def test_a_useless_part_is_left_out_and_not_lost():
    generator = torch.Generator().manual_seed(0)
    x, held_out = torch.randn(2, 2000, 1, generator=generator)
    mixture = Mixture(GMM(1, 1), GMM(1, 1), GMM(1, 1))
    start = mixture[1].mixture.locs.clone()
    grown = additive(mixture, x, validation=held_out, seed=0)
    assert [r.verdict for r in grown.rounds] == ["base", "nothing gained"]  # and no third round
    assert len(grown.mixture) == 1
    assert grown.mixture[0] is mixture[0]
    assert mixture.weights.tolist() == [1.0, 0.0, 0.0]
    assert not torch.equal(mixture[1].mixture.locs, start)  # trained, and kept
    assert grown.rounds[1].weight == 0.0
    assert grown.rounds[1].gain == 0.0
    assert grown.rounds[1].fit is not None
    on = additive(mixture, x, validation=held_out, stop=False, seed=0)
    assert [r.verdict for r in on.rounds] == ["base", "nothing gained", "nothing gained"]


def test_one_part_more():
    x, held_out = two_modes(1500, 0.9), two_modes(1500, 0.9, seed=1)
    first = additive(Mixture(GMM(1, 1)), x, validation=held_out, seed=0).mixture
    locs = first[0].mixture.locs.clone()
    more = first + GMM(1, 1)
    assert more.weights.tolist() == [1.0, 0.0]
    assert more[0] is first[0]
    grown = additive(more, x, validation=held_out, start=1, seed=0)
    assert torch.equal(first[0].mixture.locs, locs)
    assert grown.rounds[0].verdict == "grows"
    assert 0.0 < grown.mixture.weights[1] < 1.0


def test_rounds_weigh_data_by_the_mixture_so_far():
    x, held_out = two_modes(300), two_modes(200, seed=1)
    mixture = Mixture(GMM(1, 1), GMM(1, 1))
    rounds = mixture.rounds(x, held_out, ess=0.0)
    first = next(rounds)
    assert first.pair is mixture[0]
    assert first.weights is None
    assert first.name == "0.GMM"
    first.pair.fit_em(x, restarts=1)
    second = next(rounds)
    assert mixture.weights.tolist() == [1.0, 0.0]
    q = mixture[0].log_marginal(x).value.detach()
    assert torch.allclose(second.weights, 1 / q.exp() / (1 / q.exp()).mean(), rtol=1e-4)
    held = mixture[0].log_marginal(held_out).value.detach()
    assert torch.allclose(second.validation_weights, (-held).softmax(0) * 200, rtol=1e-4)
    second.pair.fit_em(x, restarts=1)
    assert next(rounds, None) is None
    assert len(rounds.steps) == 2


def test_a_third_round_weighs_data_by_both_parts():
    x = two_modes(500, 0.9)
    mixture = Mixture(GMM(1, 1), GMM(1, 1), GMM(1, 1))
    rounds = mixture.rounds(x, ess=0.0, stop=False)
    for _ in range(2):
        next(rounds).pair.fit_em(x if not rounds.steps else x[x[:, 0] > 0], restarts=1)
    third = next(rounds)
    assert 0.0 < float(mixture.weights[1]) < 1.0
    q = mixture.log_marginal(x).value.detach()
    assert torch.allclose(third.weights, (-q).softmax(0) * 500, rtol=1e-3)


def test_gradients_and_estimated_densities():
    """Bits whose second kind one small network misses; densities are importance estimates."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.tensor([[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4])
    which = (torch.rand(600, generator=generator) < 0.2).long()
    flips = torch.rand(600, 8, generator=generator) < 0.05
    x = (kinds[which].bool() ^ flips).float()
    torch.manual_seed(0)
    mixture = Mixture(
        *(VAE(8, 1, units=4, layers=1, batch_norm=False) for _ in range(2)), weights=[1.0, 0.0]
    )
    with torch.no_grad():  # a base that knows the first kind alone
        for p in mixture[0].parameters():
            p.zero_()
        mixture[0].model.fn.net.net[-1].bias.copy_(kinds[0] * 6 - 3)
    grown = additive(
        mixture, x[:400], validation=x[400:], start=1, epochs=30, lr=0.02, num_samples=10, seed=0
    )
    (step,) = grown.rounds
    assert step.kind == "estimate"
    assert step.verdict == "grows"
    assert step.gain > 0.5
    assert step.fit.epochs_run == 30
    drawn = mixture[1].sample(400)
    assert (drawn[:, 4:].mean() > drawn[:, :4].mean()).item()
    again = additive(
        mixture, x[:400], validation=x[400:], start=1, epochs=0, num_samples=10, seed=0
    )
    assert again.rounds[0].fit.epochs_run == 0


def test_a_part_may_be_trained_by_gradients_instead_of_its_own_algorithm():
    x = two_modes(400)
    mixture = Mixture(GMM(1, 1), GMM(1, 1))
    grown = additive(
        mixture,
        x,
        parts={1: {"method": "gradient", "epochs": 3, "lr": 0.1}},
        start=0,
        seed=0,
        stop=False,
    )
    assert grown.rounds[0].fit.__class__.__name__ == "EMResult"
    assert grown.rounds[1].fit.epochs_run == 3


def test_results_repeat_under_a_seed_and_leave_the_generator_alone():
    x = two_modes(300)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        mixture = Mixture(GMM(1, 1), GMM(2, 1))
        state = torch.get_rng_state()
        found.append(additive(mixture, x, seed=5, stop=False).rounds)
        assert torch.equal(torch.get_rng_state(), state)
    assert [r.after for r in found[0]] == [r.after for r in found[1]]


def test_densities_are_what_the_parts_know_and_never_bounds():
    x = (torch.rand(20, 4) < 0.5).float()
    rbm = RBM(4, 2)
    rbm.refresh()
    assert density_of(rbm, x, (), 5).kind == "exact"
    found = density_of(Cascade(VAE(4, 2, units=3), GMM(2, 2)), x, (), 50)
    assert found.kind == "estimate"
    assert found.std_error.shape == (20,)


def test_what_cannot_be_boosted_is_refused_in_words():
    mixture, x = Mixture(GMM(1, 1), GMM(1, 1)), two_modes(50)
    for words, call in (
        ("names a part", lambda: additive(mixture, x, parts={2: {}})),
        ("start=2 names no part", lambda: additive(mixture, x, start=2)),
        ("ess=1", lambda: additive(mixture, x, ess=1.0)),
        ("num_samples=1", lambda: additive(mixture, x, num_samples=1)),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="a weight of its own"):
        additive(mixture, [x])
    with pytest.raises(TypeError, match=r"got VAE, not a Mixture; wrap it in Mixture\(\.\.\.\)"):
        additive(VAE(1, 1), x)
    for options in ({"weights": torch.ones(50)}, {"parts": {1: {"weights": torch.ones(50)}}}):
        with pytest.raises(TypeError, match=r"got weights=, and its rounds make their own"):
            additive(mixture, x, **options)
    mixture.weights = [0.0, 1.0]
    with pytest.raises(ValueError, match="have weight 0"):
        list(Growth(mixture, x, start=1))
