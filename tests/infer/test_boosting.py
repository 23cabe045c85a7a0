"""Boosting from end to end: bounds, weights, what moves and what does not."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from boosting_pairs import (
    Decoder,
    Drifting,
    Encoder,
    Placed,
    Posterior,
    place,
    rows,
    standard,
    vae,
)
from pyro.infer.autoguide import AutoContinuous
from torch import nn

from pyroboost import flows
from pyroboost.distributions import Components
from pyroboost.infer import NonFiniteLoss, WeightDescent, boost
from pyroboost.infer._boosting_judge import judge
from pyroboost.infer._boosting_loop import Booster
from pyroboost.infer._boosting_settings import BoostSettings
from pyroboost.infer._mixture_table import Table
from pyroboost.metamodel import MetaModel

QUIET = {"progress": False}


def modes(weights=(0.3, 0.7), at=4.0):
    parts = dist.Normal(torch.tensor([[-at, 0.0], [at, 0.0]]), 1.0).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor(weights)), parts)


def program(law):
    return lambda *_: pyro.sample("z", law)


class Banana(dist.TorchDistribution):
    """z1 ~ N(0, 1), z2 given z1 ~ N(z1^2 / 2, 0.5), or a funnel."""

    support = dist.constraints.real_vector
    arg_constraints = {}

    def __init__(self, funnel=False):
        self.funnel = funnel
        super().__init__(torch.Size(), torch.Size([2]), validate_args=False)

    def expand(self, shape, _instance=None):
        return self

    def sample(self, sample_shape=()):
        return torch.randn(*sample_shape, 2)

    def log_prob(self, z):
        a, b = z.unbind(-1)
        first = torch.distributions.Normal(0.0, 1.0).log_prob(a)
        if self.funnel:
            return first + torch.distributions.Normal(0.0, (a / 2).exp()).log_prob(b)
        return first + torch.distributions.Normal(a.square() / 2, 0.5).log_prob(b)


SUITE = {
    "gaussian": dist.MultivariateNormal(torch.ones(2), torch.tensor([[1.0, 0.5], [0.5, 2.0]])),
    "modes": modes(),
    "banana": Banana(),
    "funnel": Banana(funnel=True),
    "student": dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1),
}


def grid(q, reach=14.0, count=561):
    """Integrate a density over the plane."""
    axis = torch.linspace(-reach, reach, count, dtype=torch.float64)
    z = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).float()
    with torch.no_grad():
        return float(q.log_prob(z).double().exp().sum() * (axis[1] - axis[0]) ** 2)


@pytest.mark.parametrize("name", SUITE)
def test_the_bound_never_falls_within_its_error_and_the_mixture_integrates_to_one(name):
    torch.manual_seed(1)
    guide = Posterior(count=3)
    result = boost((program(SUITE[name]), guide), steps=120, lr=0.05, seed=0, **QUIET)
    bounds = [r.bound for r in result.rounds]
    for a, b in itertools.pairwise(bounds):
        assert b.value > a.value - 3 * math.hypot(a.error, b.error)
    assert result.bound.value < 4 * result.bound.error  # log Z is 0
    assert grid(guide.components(standard(2)), reach=30.0, count=601) == pytest.approx(1, abs=2e-3)
    assert sum(result.weights) == pytest.approx(1.0, abs=1e-5)
    assert guide.components.weights.tolist() == pytest.approx(list(result.weights))


def test_component_2_finds_the_other_mode_and_the_weights_are_right():
    torch.manual_seed(0)
    guide = Posterior(count=2, flow=lambda: flows.affine(2, spread=2.0))
    place(guide.components.flows[0], torch.tensor([3.0, 0.0]))
    result = boost((program(modes()), guide), steps=400, lr=0.05, seed=0, finetune=1, **QUIET)
    assert [r.verdict for r in result.rounds][:2].count("base") == 1
    with torch.no_grad():
        q = guide.components(standard(2))
        centres = [q.rsample_component(c, (500,)).mean(0) for c in range(2)]
    first = 0 if centres[0][0] < 0 else 1
    assert abs(float(centres[first][0]) + 4) < 0.3
    assert abs(float(centres[1 - first][0]) - 4) < 0.3
    assert result.weights[first] == pytest.approx(0.3, abs=0.02)
    assert result.bound.value == pytest.approx(0.0, abs=0.02)
    assert grid(q) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("weights", ["line", "gradient", WeightDescent(step=0.02, num_samples=50)])
def test_other_ways_of_weighing_find_the_same_weights(weights):
    guide = Placed([torch.tensor([3.0, 0.0]), torch.tensor([-3.0, 0.0])], count=2)
    place(guide.components.flows[0], torch.tensor([3.0, 0.0]))
    settings = {"steps": 200, "lr": 0.05, "finetune": 0, "seed": 0, **QUIET}
    result = boost((program(modes()), guide), weights=weights, **settings)
    assert result.weights[1] == pytest.approx(0.3, abs=0.04)
    assert len(result.rounds[1].steps) > 5


def test_equal_weights_are_equal_where_they_gain():
    guide = Placed([torch.tensor([3.0, 0.0]), torch.tensor([-3.0, 0.0])], count=2)
    place(guide.components.flows[0], torch.tensor([3.0, 0.0]))
    settings = {"steps": 200, "lr": 0.05, "finetune": 0, "seed": 0, **QUIET}
    result = boost((program(modes()), guide), weights="equal", **settings)
    assert result.weights == (0.5, 0.5)


@pytest.mark.parametrize("objective", ["residual", "kl", "sampled", "mixture"])
def test_every_objective_finds_the_missing_mode(objective):
    guide = Placed([torch.tensor([3.0, 0.0]), torch.tensor([-3.0, 0.0])], count=2)
    place(guide.components.flows[0], torch.tensor([3.0, 0.0]))
    result = boost(
        (program(modes()), guide),
        objective=objective,
        steps=200,
        lr=0.05,
        seed=0,
        annealing=50,
        num_particles=2,
        **QUIET,
    )
    assert result.weights[1] == pytest.approx(0.3, abs=0.03)
    assert result.bound.value == pytest.approx(0.0, abs=0.05)


def test_two_fresh_starts_without_gain_stop():
    torch.manual_seed(0)
    guide = Posterior(count=3, flow=lambda: flows.lu(2, spread=0.3))
    result = boost(
        (program(SUITE["gaussian"]), guide), num_particles=10, steps=200, lr=0.03, seed=0, **QUIET
    )
    assert [r.verdict for r in result.rounds] == ["base"] + ["nothing gained: put back"] * 2
    assert [(r.component, r.attempt) for r in result.rounds] == [(0, 0), (1, 0), (1, 1)]
    assert result.stopped == "2 fresh starts in a row gained nothing"
    assert result.weights == (1.0, 0.0, 0.0)
    for r in result.rounds[1:]:
        assert r.gain.value <= 2 * r.gain.error


def state(module):
    found = module.state_dict().items()
    return {name: value.clone() for name, value in found if isinstance(value, torch.Tensor)}


def test_frozen_flows_stand_still_with_their_buffers_and_get_their_flags_back():
    torch.manual_seed(0)
    make = lambda: flows.Flow([Drifting(2)], name="drifting")  # noqa: E731
    pair = MetaModel(Decoder(), Encoder(count=3, flow=make), visible="x", hidden="z")
    components = pair.guide.fn.components
    components.weights.copy_(torch.tensor([0.5, 0.5, 0.0]))
    components.flows[1].steps[0].coefficients.bias.requires_grad_(False)
    before, modes_ = state(components), [m.training for m in pair.modules()]
    result = boost(
        pair, rows(60), epochs=2, start=2, finetune=0, seed=0, blend=0.5, threshold=0.0, **QUIET
    )
    assert result.rounds[0].component == 2
    after = state(components)
    for name in before:
        if name.startswith(("flows.0", "flows.1")):
            assert torch.equal(before[name], after[name]), name
    assert [p.requires_grad for p in components.parameters()] == [True, False, True]
    assert [m.training for m in pair.modules()] == modes_


def test_the_first_round_trains_everything_but_the_other_flows():
    pair = vae(count=2)
    before = state(pair)
    settings = {"epochs": 1, "failures": 1, "finetune": 0, "threshold": 1e9, "seed": 0}
    boost(pair, rows(60), **settings, **QUIET)
    after = state(pair)
    for name, _ in pair.named_parameters():
        assert torch.equal(after[name], before[name]) == ("flows.1" in name), name


def test_a_rejected_round_leaves_everything_bit_identical():
    torch.manual_seed(0)

    class Shifted(Decoder):
        def forward(self, x):
            pyro.param("free", torch.tensor(1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", standard(2))
                mean = self.net(z) + pyro.param("free")
                pyro.sample("x", dist.Normal(mean, self.log_scale.exp()).to_event(1), obs=x)

    make = lambda: flows.Flow([Drifting(2)], name="drifting")  # noqa: E731
    pair = MetaModel(Shifted(), Encoder(count=2, flow=make), visible="x", hidden="z")
    settings = {"epochs": 2, "finetune": 0, "seed": 0, **QUIET}
    boost(pair, rows(60), failures=1, threshold=1e9, **settings)
    kept, free = state(pair), pyro.param("free").detach().clone()
    result = boost(pair, rows(60), start=1, threshold=1e9, **settings)
    assert [r.accepted for r in result.rounds] == [False, False]
    assert float(free) != 1.0
    assert torch.equal(free, pyro.param("free").detach())
    after = state(pair)
    assert all(torch.equal(kept[name], after[name]) for name in kept)


def test_a_fine_tuning_step_that_is_worse_is_put_back():
    guide = Placed([torch.tensor([4.0, 0.0]), torch.tensor([-4.0, 0.0])], count=2)
    for flow, centre in zip(guide.components.flows, guide.places, strict=True):
        place(flow, centre)
    guide.components.weights.copy_(torch.tensor([0.7, 0.3]))
    before = state(guide)
    settings = {"optimizer": lambda p: torch.optim.SGD(p, lr=50.0), "seed": 1, **QUIET}
    tuned = {"finetune": 1, "finetune_objective": "residual"}
    for given in (tuned, {"finetune": 0, "joint": 1}):
        wild = boost((program(modes()), guide), steps=1, start=2, **given, **settings)
        lost = {"worse: put back", "failed: a density is not finite"}
        assert {r.verdict for r in wild.rounds} <= lost
        assert not any(r.accepted for r in wild.rounds)
        assert wild.weights == pytest.approx((0.7, 0.3))
        after = state(guide)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_joint_training_mends_flows_and_weights():
    guide = Posterior(count=2)
    for flow, centre in zip(guide.components.flows, (3.0, -3.0), strict=True):
        place(flow, torch.tensor([centre, 0.5]))
    guide.components.weights.copy_(torch.tensor([0.5, 0.5]))
    settings = {"steps": 1, "start": 2, "finetune": 0, "joint": 200, "lr": 0.05, "seed": 0}
    result = boost((program(modes()), guide), num_particles=10, **settings, **QUIET)
    assert [r.name for r in result.rounds] == ["joint all"]
    assert "joint all" in result.table()
    assert result.weights[0] == pytest.approx(0.7, abs=0.03)
    assert result.bound.value == pytest.approx(0.0, abs=0.05)


def by_tables(joint_after, scores_after, weights, options=None):
    """Judge component 1 beside component 0, from tables of 50 draws of one datum."""
    before = Table(torch.zeros(1, 50, 1), torch.zeros(1, 50, 1, 1), torch.ones(1), (0,), False)
    noise = 0.01 * torch.randn(2, 50, 1)
    joint = torch.tensor(joint_after)[:, None, None] + noise
    after = Table(joint, scores_after.expand(2, 50, 1, 2), torch.ones(1), (0, 1), False)
    options = booster_arguments(None, steps=1)[4]
    found = (torch.tensor(weights), [])
    return judge("round", 1, before, torch.tensor([1.0, 0.0]), after, found, options)


def test_a_component_is_kept_dropped_or_put_back():
    alike, apart = torch.zeros(1), torch.tensor([[0.0, -9.0], [-9.0, 0.0]])[:, None, None, :]
    grown = by_tables([0.0, 0.0], apart, [0.5, 0.5])
    assert grown.verdict == "grows"
    assert grown.keep
    assert grown.weights == (0.5, 0.5)
    assert grown.gain.value == pytest.approx(math.log(2), abs=0.01)
    assert grown.own.value == pytest.approx(math.log(2), abs=0.01)
    dropped = by_tables([0.5, 0.5], alike, [0.5, 0.5])
    assert dropped.verdict == "dropped: the networks alone gained"
    assert dropped.keep
    assert not dropped.accepted
    assert dropped.weights == (1.0, 0.0)
    assert dropped.gain.value == pytest.approx(0.5, abs=0.02)
    assert abs(dropped.own.value) < 0.02
    for joint, scores in (([0.0, 0.0], alike), ([-2.0, -2.0], apart)):
        lost = by_tables(joint, scores, [0.5, 0.5])
        assert lost.verdict == "nothing gained: put back"
        assert not lost.keep
        assert lost.weights == (1.0, 0.0)
        assert lost.bound.value == 0.0


def test_minibatches_of_an_exact_model_stay_below_log_p():
    torch.manual_seed(0)
    pair, x, held_out = vae(count=2), rows(300), rows(200, seed=9)
    result = boost(
        pair,
        x,
        validation=held_out,
        epochs=12,
        batch_size=50,
        lr=0.02,
        annealing=3,
        seed=0,
        track=True,
        **QUIET,
    )
    with torch.no_grad():
        log_p = float(pair.model.fn.log_marginal(held_out).mean())
    assert result.bound.value < log_p + 0.01
    assert result.bound.value > log_p - 0.5
    assert result.held_out
    assert "per datum" in result.table()
    row = result.history[0]
    assert {"stage", "pass", "component", "step", "validation_bound", "mixture_bound"} <= set(row)
    assert row["beta"] < 1.0
    starts = [r for r in result.history if r["epoch"] == 1 and r["stage"] == "round"]
    assert all(r["beta"] < 1.0 for r in starts)  # annealed anew in each round
    assert [r["step"] for r in result.history] == list(range(len(result.history)))


def test_the_same_seed_gives_the_same_result_and_the_process_keeps_its_own():
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        pair = vae(count=2)
        before = torch.get_rng_state()
        results.append(boost(pair, rows(60), epochs=2, seed=3, **QUIET))
        assert torch.equal(before, torch.get_rng_state())
    a, b = results
    assert [r.bound for r in a.rounds] == [r.bound for r in b.rounds]
    assert a.weights == b.weights
    torch.manual_seed(4)
    other = boost(vae(count=2), rows(60), epochs=2, seed=4, **QUIET)
    assert other.bound != a.bound


def test_arguments_and_keywords_of_the_model_are_passed():
    x, y = torch.linspace(-1, 1, 30)[:, None], torch.linspace(-1, 1, 30) * 2 + 1

    def regression(x, y=None, *, scale):
        w = pyro.sample("z", standard(2))
        mean = w[..., 0] + w[..., 1] * x[:, 0]
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    class Guide(Posterior):
        def forward(self, x, y=None, *, scale):
            return super().forward()

    torch.manual_seed(0)
    guide = Guide(count=1)
    result = boost(
        (regression, guide),
        (x, y),
        kwargs={"scale": 0.5},
        steps=300,
        num_particles=10,
        lr=0.05,
        seed=0,
        **QUIET,
    )
    design = torch.stack([torch.ones(30), x[:, 0]], 1)
    cov = 0.25 * torch.eye(30) + design @ design.T
    exact = torch.distributions.MultivariateNormal(torch.zeros(30), cov).log_prob(y)
    assert result.bound.value == pytest.approx(float(exact), abs=0.12)


class AutoMixture(AutoContinuous):
    def __init__(self, model, count):
        super().__init__(model)
        self.components = Components(lambda: flows.affine(2, spread=0.5), count)

    def get_posterior(self, *args, **kwargs):
        return self.components(standard(self.latent_dim))


def test_autoguides_with_constraints_have_the_right_bound():
    """a > 0 and b share a factor: log p(x) is known, and the guide's Jacobian is in the bound."""

    def model():
        a = pyro.sample("a", dist.LogNormal(0.3, 0.8))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(b + a.log(), 1.0), obs=torch.tensor(1.0))

    exact = torch.distributions.Normal(0.3, math.sqrt(0.64 + 1 + 1)).log_prob(torch.tensor(1.0))
    torch.manual_seed(0)
    guide = AutoMixture(model, 1)
    guide.components = Components(lambda: flows.lu(2), 2)
    for objective in ("residual", "kl"):
        result = boost(
            (model, guide),
            steps=200,
            lr=0.05,
            num_particles=10,
            objective=objective,
            entropy=0.8,
            failures=1,
            finetune=0,
            seed=0,
            **QUIET,
        )
        assert result.bound.value == pytest.approx(float(exact), abs=0.02)


def test_a_first_component_that_breaks_raises_and_a_later_one_is_put_back():
    def broken(*_):
        z = pyro.sample("z", standard(2))
        pyro.factor("x", (z * math.inf).sum(-1) * 0)

    with pytest.raises(NonFiniteLoss):
        boost((broken, Posterior(count=2)), steps=3, seed=0, **QUIET)

    def fragile(*_):
        z = pyro.sample("z", standard(2))
        far = torch.where(z[..., 0] > 50, math.nan, 0.0)
        pyro.sample("x", dist.Delta(torch.zeros(()), log_density=far), obs=torch.zeros(()))

    guide = Placed([torch.zeros(2), torch.tensor([100.0, 0.0])], count=2)
    result = boost((fragile, guide), steps=50, seed=0, **QUIET)
    assert result.rounds[1].verdict.startswith("failed")
    assert result.weights == (1.0, 0.0)
    assert result.bound.value == pytest.approx(0, abs=0.3)


def test_an_interrupt_leaves_the_last_mixture():
    guide = Posterior(count=2)
    boost((program(SUITE["gaussian"]), guide), steps=50, failures=1, seed=0, **QUIET)
    before = state(guide)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        boost((program(SUITE["gaussian"]), guide), steps=50, start=1, callbacks=[stop], **QUIET)
    after = state(guide)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in guide.parameters())


def test_heterogeneous_components_are_boosted():
    torch.manual_seed(0)
    guide = Posterior(count=2)
    guide.components = Components([lambda: flows.lu(2), lambda: flows.realnvp(2, 1, units=8)])
    result = boost((program(Banana()), guide), steps=150, lr=0.02, seed=0, **QUIET)
    assert result.rounds[0].verdict == "base"


def test_floor_is_measured_from_the_mixtures_own_mean():
    guide = Posterior(count=2)
    place(guide.components.flows[0], torch.tensor([5.0, -3.0]), 10.0)
    pair = (program(SUITE["gaussian"]), guide)
    booster = Booster(*booster_arguments(pair, steps=10, floor=7.0, num_samples=50_000))
    entropy = -2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(10.0))
    found = booster._floor(torch.tensor([1.0, 0.0]))
    assert found == pytest.approx(entropy - 7.0, abs=0.05)


def booster_arguments(pair, **given):
    defaults = {
        "steps": None, "epochs": None, "batch_size": 100, "objective": "residual",
        "entropy": 1.0, "floor": 10.0, "blend": None, "weights": "simplex", "finetune": 1,
        "finetune_length": None, "finetune_objective": "mixture", "joint": 0, "start": 0,
        "failures": 2, "threshold": 2.0, "num_particles": 1, "num_samples": None,
        "evaluate_on": 500, "track": False, "checkpoints": None, "seed": 0, "fit": {},
    }  # fmt: skip
    return pair, (), None, {}, BoostSettings(**{**defaults, **given})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "give steps="),
        ({"steps": 3, "epochs": 3}, "give steps="),
        ({"steps": 3, "objective": "other"}, "objective is 'other'"),
        ({"steps": 3, "weights": "other"}, "weights is 'other'"),
        ({"steps": 3, "entropy": 0.0}, "entropy is 0.0"),
        ({"steps": 3, "floor": -1.0}, "floor is -1.0"),
        ({"steps": 3, "blend": 1.0}, "blend is 1.0"),
        ({"steps": 0}, "length is 0"),
        ({"steps": 3, "start": 5}, "start=5"),
        ({"steps": 3, "start": 1}, "no component before has a weight"),
        ({"steps": 3, "patience": 2}, "leave validation and patience out"),
        ({"steps": 3, "loss": None}, "loss is not to be chosen"),
        ({"steps": 3, "failures": 0}, "failures is 0"),
        ({"epochs": 3, "kwargs": {"a": 1}}, "kwargs are for steps="),
    ],
)
def test_useless_options_are_refused(settings, words):
    guide = Posterior(count=3)
    guide.components.weights.copy_(torch.tensor([0.0, 0.0, 1.0]))
    data = torch.zeros(5, 1) if "epochs" in settings and "steps" not in settings else ()
    with pytest.raises(ValueError, match=words):
        boost((program(modes()), guide), data, **settings, **QUIET)


def test_guides_without_one_set_of_components_are_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Posterior(), Posterior()

        def forward(self):
            return self.a()

    with pytest.raises(ValueError, match="holds 2 pyroboost"):
        boost((program(modes()), Two()), steps=3, **QUIET)
    scale = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="holds 0 pyroboost"):
        boost(
            (program(modes()), lambda: pyro.sample("z", dist.Normal(scale, 1.0).to_event(1))),
            steps=3,
            **QUIET,
        )
