"""Boosting of flows on data: what is found, kept, and put back."""

import copy
import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch

from pyroboost import flows
from pyroboost.compose import Cascade, Mixture
from pyroboost.data import plane_grid
from pyroboost.infer import NonFiniteLoss, additive, greedy
from pyroboost.models import VAE, FlowMixture
from pyroboost.models._flow_fit import Growth
from pyroboost.models._flow_options import Options
from pyroboost.models._flow_weights import solve_weights

DOUBLE = torch.float64
SMALL = partial(flows.realnvp, steps=1, units=8, spread=0.2)


def two_modes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.rand(count, generator=generator) < 0.3
    place = torch.where(left, -2.5, 2.5)[:, None] * torch.tensor([1.0, 0.5])
    return place + 0.5 * torch.randn(count, 2, generator=generator)


def test_the_second_component_finds_the_other_mode_and_the_weights_are_right():
    train, held_out, test = two_modes(2000), two_modes(1000, 1), two_modes(4000, 2)
    mixture = FlowMixture(2, 3, flows.affine)
    report = mixture.fit(
        train, validation=held_out, steps=80, passes=1, lr=0.1, batch_size=500, seed=0
    )
    weights, parts = mixture.weights, mixture.components
    centres = torch.stack([parts.loc + parts.scale * f(torch.zeros(2))[0]
                           for f in parts.flows.flows]).detach()  # fmt: skip
    left = weights[centres[:, 0] < 0].sum()
    assert float(left) == pytest.approx(0.3, abs=0.02)
    assert all(b >= a for a, b in zip(report.history, report.history[1:], strict=False))
    first, verdicts = report.history[0], [s.verdict for s in report.steps]
    assert verdicts[:2] == ["base", "grows"]
    truth = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])),
        dist.Normal(torch.tensor([[-2.5, -1.25], [2.5, 1.25]]), 0.5).to_event(1),
    ).log_prob(test)
    gap = truth - mixture.log_marginal(test).value.detach()
    assert float(gap.mean()) < 0.03
    assert first < report.history[-1] - 0.5
    assert "grows" in str(report)
    grid = plane_grid(8.0, 300)
    total = grid.log_integral(grid.evaluate(parts.log_density))
    assert total == pytest.approx(0.0, abs=2e-3)


def test_a_component_that_does_not_help_has_weight_zero():
    x = torch.randn(900, 2)
    mixture = FlowMixture(2, 3, flows.affine)
    report = mixture.fit(
        x[:600], validation=x[600:], steps=30, passes=0, lr=0.05, objective="residual", seed=1
    )
    assert mixture.weights.tolist() == [1.0, 0.0, 0.0]
    assert [s.verdict for s in report.steps] == ["base", "nothing gained", "nothing gained"]
    assert mixture.components.flows.active == [0]


def placed(dim):
    """An affine flow that always starts at one place, where no gradient is zero but for noise."""
    flow = flows.affine(dim, spread=0.0)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(torch.linspace(0.1, 0.3, p.numel()).reshape(p.shape))
    return flow


def test_weights_are_repetitions():
    """Fits and weights are those of repeated data; errors are wider, since the data are fewer."""
    x = two_modes(150).double()
    times = torch.randint(1, 4, (150,))
    plain = {"resample": False, "ess": 0.0, "objective": "residual", "batch_size": 1000, "lr": 0.1}
    rounds, found = [], []
    for data, weights in ((x, times.double()), (x.repeat_interleave(times, 0), None)):
        mixture = FlowMixture(2, 2, placed).double()
        report = mixture.fit(data, weights=weights, steps=16, attempts=1, passes=0, seed=3, **plain)
        rounds.append(report.steps)
        # Verdicts on a round weigh its gain by its error, so what follows starts anew.
        mixture = FlowMixture(2, 2, placed).double()
        mixture.standardise_by(data, weights)
        mixture.weights = torch.tensor([0.5, 0.5])
        before = mixture.log_marginal(x).mean
        mixture.fit(
            data, weights=weights, start="current", steps=16, joint_steps=8, seed=3, **plain
        )
        found.append(mixture)
    weighted, repeated = rounds
    assert weighted[1].gain == pytest.approx(repeated[1].gain, abs=1e-5)
    assert weighted[1].gain_error > 1.2 * repeated[1].gain_error
    assert weighted[0].ess == pytest.approx(float(times.sum() ** 2 / (times**2).sum()))
    assert found[0].log_marginal(x).mean > before + 0.02
    torch.testing.assert_close(found[0].weights, found[1].weights, atol=1e-5, rtol=0)
    values = [m.log_marginal(x).value.detach() for m in found]
    torch.testing.assert_close(*values, atol=1e-5, rtol=0)


def test_a_round_weighs_the_data_by_one_over_the_mixture_and_says_how_many_count():
    """The weights that reach the fit are 1/q tempered to the effective sample size asked for."""
    x, seen = two_modes(200).double(), []
    mixture = FlowMixture(2, 2, flows.affine).double()
    mixture.standardise_by(x)
    trainer = Growth(mixture, (x, None), None, options(resample=False, ess=0.7))
    trainer._fit = lambda pair, steps, rows, weights, held, *more: seen.append(weights)
    with torch.no_grad():
        trainer._score([0])
        log_q = mixture.log_marginal(x).value
        trial = trainer.new_component(1, mixture.weights)
    weights = seen[0].double()
    assert trial.ess == pytest.approx(0.7 * 200, rel=1e-6)
    assert trial.ess == pytest.approx(float(weights.sum() ** 2 / weights.square().sum()), rel=1e-4)
    assert 0 < trial.beta < 1
    expected = torch.softmax(-trial.beta * log_q, 0) * 200
    torch.testing.assert_close(weights, expected, atol=1e-4, rtol=1e-4)
    assert log_q[weights.argmax()] == log_q.min()


def options(**changed):
    plain = {
        "start": "fresh", "steps": 4, "objective": "residual", "ess": 0.1, "resample": True,
        "attempts": 2, "passes": 0, "pass_steps": 2, "joint_steps": 0, "batch_size": 64,
        "settings": {"lr": 0.05},
    }  # fmt: skip
    return Options(**{**plain, **changed})


def test_rows_of_weight_zero_do_not_count():
    x, wild = two_modes(80), torch.full((5, 2), 40.0)
    weights = torch.cat([torch.ones(80), torch.zeros(5)])
    mixture = FlowMixture(2, 1, flows.affine)
    mixture.fit(torch.cat([x, wild]), weights=weights, steps=2, seed=0)
    torch.testing.assert_close(mixture.components.loc, x.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixture.components.scale, x.std(0, correction=0))


def test_data_of_any_scale_are_fitted_alike():
    x = two_modes(300).double()
    shift, stretch = torch.tensor([1e3, -5.0]).double(), torch.tensor([1e-2, 100.0]).double()
    values = []
    for data in (x, shift + stretch * x):
        mixture = FlowMixture(2, 2, flows.affine).double()
        mixture.fit(data, steps=20, lr=0.05, seed=0)
        values.append(mixture.log_marginal(data).value.detach())
    torch.testing.assert_close(values[0], values[1] + stretch.log().sum(), atol=1e-3, rtol=1e-3)


def test_growth_goes_on_from_the_present_state():
    x = two_modes(1500)
    mixture = FlowMixture(2, 2, flows.affine)
    small = FlowMixture(2, 1, flows.affine)
    small.fit(x, steps=100, lr=0.05, batch_size=500, seed=0)
    mixture.components.flows.flows[0].load_state_dict(small.components.flows.flows[0].state_dict())
    mixture.standardise_by(x)
    before = mixture.log_marginal(x)
    torch.testing.assert_close(before.value, small.log_marginal(x).value)
    report = mixture.fit(x, start="current", steps=100, passes=0, lr=0.05, batch_size=500, seed=0)
    assert [s.component for s in report.steps] == [1]
    assert mixture.log_marginal(x).mean > before.mean + 0.1


def test_a_fit_that_ends_below_its_start_is_put_back():
    x = torch.randn(40, 2)
    mixture = FlowMixture(2, 1, partial(flows.affine, spread=0.0))
    report = mixture.fit(4 + x, validation=torch.randn(200, 2), steps=20, lr=0.1, seed=0)
    assert report.kept_start
    assert "the start was kept" in str(report)
    zero = torch.zeros(1, 2)
    assert mixture.log_marginal(zero).mean == pytest.approx(-math.log(2 * math.pi), abs=1e-6)


def test_a_seed_makes_the_fit_and_leaves_the_stream_alone():
    x, found = two_modes(200), []
    before = torch.get_rng_state()
    start = FlowMixture(2, 2, SMALL).state_dict()
    torch.set_rng_state(before)
    for _ in range(2):
        mixture = FlowMixture(2, 2, SMALL)
        mixture.load_state_dict(start)
        mixture.fit(x, steps=6, seed=5)
        found.append(mixture.log_marginal(x).value.detach())
        torch.set_rng_state(before)
    assert torch.equal(*found)
    mixture.fit(x, steps=2, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_it_is_a_prior_on_top_of_a_vae():
    torch.manual_seed(1)
    bits = (torch.rand(400, 6) < torch.where(torch.rand(400, 1) < 0.5, 0.1, 0.9)).float()
    cascade = Cascade(VAE(6, 2, units=8), FlowMixture(2, 2, SMALL))
    grown = greedy(
        cascade,
        bits[:300],
        validation=bits[300:],
        epochs=4,
        stages={1: {"steps": 12, "passes": 0}},
        seed=0,
        stop=False,
    )
    top = grown.stages[1]
    assert top.held_out.value > -2 * top.held_out.std_error
    assert grown.cascade.sample(4).shape == (4, 6)


def test_it_is_a_part_of_additive_boosting():
    x = two_modes(300)
    parts = FlowMixture(2, 1, flows.affine), FlowMixture(2, 1, flows.affine)
    grown = additive(Mixture(*parts), x, epochs=6, lr=0.1, batch_size=100, seed=0)
    m = torch.stack([p.log_marginal(x).value for p in parts], -1)
    weights = torch.as_tensor(grown.mixture.weights).to(m)
    found = grown.mixture.log_marginal(x)
    assert found.kind == "exact"
    torch.testing.assert_close(found.value, (m + weights.log()).logsumexp(-1))


def test_components_may_differ_and_one_dimension_will_do():
    x = torch.cat([torch.randn(300, 1) - 3, torch.randn(300, 1) + 3])
    mixture = FlowMixture(1, flow=[flows.affine, partial(flows.spline, steps=1)])
    report = mixture.fit(x, steps=30, passes=0, lr=0.1, seed=0)
    assert report.history[-1] >= report.history[0]
    grid = torch.linspace(-15, 15, 3001)[:, None]
    with torch.no_grad():
        total = mixture.log_marginal(grid).value.exp().sum() * 0.01
    assert float(total) == pytest.approx(1.0, abs=2e-3)
    with pytest.raises(ValueError, match=r"for one dimension use flows\.spline"):
        FlowMixture(1, 2)


def test_weights_are_those_of_training_data():
    """Held-out data, here with other shares of the modes, judge and do not choose them."""
    generator = torch.Generator().manual_seed(0)

    def modes(left, right):
        x = 0.5 * torch.randn(left + right, 2, generator=generator)
        x[:left, 0] -= 3
        x[left:, 0] += 3
        return x

    train, held_out = modes(700, 300), modes(450, 550)
    mixture = FlowMixture(2, 2, flows.affine)
    report = mixture.fit(train, validation=held_out, steps=100, lr=0.05, passes=0, seed=0)
    assert report.steps[1].verdict == "grows"
    parts = {c: mixture.component(c).log_marginal(train).value.detach() for c in range(2)}
    expected = solve_weights(parts, mixture.weights)
    torch.testing.assert_close(mixture.weights.double(), expected, atol=2e-3, rtol=0)
    others = {c: mixture.component(c).log_marginal(held_out).value.detach() for c in range(2)}
    assert float((solve_weights(others, mixture.weights) - expected).abs().max()) > 0.01


# What is not lost


def tensors(state):
    return [name for name, value in state.items() if isinstance(value, torch.Tensor)]


class _Stop(Exception):
    """Stands for Ctrl-C."""


def _grown(x, **settings):
    mixture = FlowMixture(2, 2, flows.affine)
    mixture.fit(x, steps=10, passes=0, lr=0.1, attempts=1, seed=0, **settings)
    return mixture


@pytest.mark.parametrize("kind", [KeyboardInterrupt, _Stop])
@pytest.mark.parametrize("start", ["fresh", "current"])
def test_a_fit_broken_off_leaves_the_mixture_before_it(kind, start):
    x = two_modes(200)
    mixture = _grown(x)
    before = copy.deepcopy(mixture.state_dict())

    def break_off(state):
        raise kind

    if start == "current":
        mixture.weights = torch.tensor([1.0, 0.0])
        before = copy.deepcopy(mixture.state_dict())
    with pytest.raises(kind):
        mixture.fit(x + 1, start=start, steps=4, callbacks=[break_off], seed=0)
    after = mixture.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in tensors(before))
    assert all(p.requires_grad for p in mixture.parameters())
    assert mixture.components.flows.flows[0].training


def test_ctrl_c_in_a_later_fit_keeps_the_earlier_ones():
    x, fits = two_modes(300), []

    def break_off(state):
        if state.epoch == 1:
            fits.append(mixture.log_marginal(x).mean)
        if len(fits) == 4:  # the second half of the first pass
            raise KeyboardInterrupt

    mixture = FlowMixture(2, 2, flows.affine)
    with pytest.raises(KeyboardInterrupt):
        mixture.fit(x, steps=60, lr=0.1, callbacks=[break_off], objective="mixture", seed=0)
    again = FlowMixture(2, 2, flows.affine)
    again.fit(x, steps=60, lr=0.1, passes=0, objective="mixture", seed=0)
    assert len(again.components.flows.active) == 2
    torch.testing.assert_close(mixture.weights, again.weights)
    torch.testing.assert_close(mixture.log_marginal(x).value, again.log_marginal(x).value)


def test_a_round_that_is_not_finite_is_put_back():
    fits = []

    def poison(state):
        fits.append(state.epoch)
        if fits.count(1) > 1:
            with torch.no_grad():
                next(p for p in state.pair.parameters() if p.requires_grad).fill_(math.nan)

    x = two_modes(200)
    mixture = FlowMixture(2, 2, flows.affine)
    report = mixture.fit(x, steps=6, lr=0.05, callbacks=[poison], seed=0)
    assert [s.verdict for s in report.steps] == ["base", "not finite", "not finite"]
    assert mixture.weights.tolist() == [1.0, 0.0]
    assert all(p.isfinite().all() for p in mixture.parameters())
    assert "not finite" in str(report)
    with pytest.raises(NonFiniteLoss):
        mixture.fit(x, steps=6, callbacks=[poison], seed=0)
    assert mixture.log_marginal(x).mean == pytest.approx(report.history[-1], abs=1e-5)


class _Lapsing(flows.Affine):
    """A step whose inverse gives NaN when gradients are off, as a diverged one may."""

    lapses = False

    def _pull(self, y, context):
        x, log_det = super()._pull(y, context)
        bad = self.lapses and not torch.is_grad_enabled()
        return (x * math.nan if bad else x), log_det


def test_a_density_that_is_no_number_is_put_back_or_told_in_one_sentence(monkeypatch):
    """Densities are also taken outside the loss, where torch would print all data it refuses."""
    x = two_modes(200)
    mixture = FlowMixture(2, 2, lambda dim: flows.Flow([_Lapsing(dim)], name="lapsing"))
    report = mixture.fit(x, steps=6, lr=0.05, attempts=1, seed=0)
    assert report.steps[1].verdict != "not finite"
    once = mixture.log_marginal(x).value

    def spoil(state):
        monkeypatch.setattr(_Lapsing, "lapses", True)

    with pytest.raises(NonFiniteLoss, match=r"components \[0\] is not a number at 200 of 200 data"):
        mixture.fit(x, steps=6, callbacks=[spoil], seed=0)
    monkeypatch.setattr(_Lapsing, "lapses", False)
    torch.testing.assert_close(mixture.log_marginal(x).value, once)


def test_autoregressive_flows_grow_on_request():
    x = two_modes(200)
    mixture = FlowMixture(2, 2, flows.iaf, allow_slow=True)
    report = mixture.fit(x, steps=20, passes=0, attempts=1, seed=0)
    assert report.history[-1] >= report.history[0]
    parts = torch.stack([mixture.component(c).log_marginal(x).value for c in range(2)], -1)
    whole = (parts + mixture.weights.log()).logsumexp(-1)
    torch.testing.assert_close(mixture.log_marginal(x).value, whole)
    with pytest.raises(ValueError, match="allow_slow=True"):
        FlowMixture(2, 2, flows.iaf)
