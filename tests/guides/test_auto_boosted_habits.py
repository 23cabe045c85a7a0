"""AutoBoostedFlow where Pyro's users are: modules, partials, masks, copies, SVI again and again."""

import math
import pickle
from contextlib import nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam
from torch.distributions import constraints

from pyroboost.diagnostics import report
from pyroboost.guides import AutoBoostedFlow
from pyroboost.infer import boost


class Mean(PyroModule):
    """y ~ N(w, 1) with w ~ N(0, 1), as a module."""

    def __init__(self):
        super().__init__()
        self.w = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, y):
        pyro.sample("y", dist.Normal(self.w, 1.0), obs=y)


class Regression(PyroModule):
    """The regression of Pyro's tutorial, whose layer has samples for weights."""

    def __init__(self):
        super().__init__()
        self.layer = PyroModule[torch.nn.Linear](2, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        mean = self.layer(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, scale), obs=y)


def squared(y):
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(z * z, 0.5), obs=y)


def test_modules_are_boosted_without_a_first_call():
    model = Mean()
    before = set(pyro.get_param_store().keys())
    found = boost(
        (model, AutoBoostedFlow(model, components=2)), torch.tensor(1.0), steps=20, seed=0
    )
    exact = float(dist.Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(1.0)))
    assert found.bound.value == pytest.approx(exact, abs=0.01)
    assert set(pyro.get_param_store().keys()) == before


@pytest.mark.parametrize("listed", [False, True])
def test_a_bayesian_regression_is_boosted_and_judged(listed):
    torch.manual_seed(0)
    x = torch.randn(40, 2)
    y = x[:, 0] - x[:, 1] + 0.3 * torch.randn(40)
    model = Regression()
    guide = AutoBoostedFlow(model, components=1)
    if listed:
        guide = AutoGuideList(model)
        guide.append(AutoBoostedFlow(poutine.block(model, hide=["scale"]), components=1))
        guide.append(AutoNormal(poutine.block(model, expose=["scale"])))
    found = boost((model, guide), (x, y), steps=40, seed=0)
    judged = report((model, guide), x, y, num_samples=200)
    assert judged.elbo.value == pytest.approx(found.bound.value, abs=5 * judged.elbo.std_error)
    fresh = report((model, AutoNormal(model)), x, y, num_samples=100)  # not called before either
    assert math.isfinite(fresh.elbo.value)


@pytest.mark.parametrize(
    "bound",
    [lambda g, y: partial(g, y), lambda g, y: partial(g, y=y), lambda g, y: lambda: g(y)],
    ids=["partial", "by name", "closure"],
)
def test_a_guide_with_bound_arguments_proposes_on_these(bound):
    y = torch.tensor(4.0)
    guide = AutoBoostedFlow(squared, components=2)
    found = boost((partial(squared, y), bound(guide, y)), steps=60, seed=0)
    assert sorted(found.weights) == pytest.approx([0.5, 0.5], abs=0.02)


def test_a_latent_that_is_masked_in_part_is_refused():
    """It has no density there, so that a bound could be anything."""

    def missing(y, seen):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y, obs_mask=seen)

    def masked(y, seen):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    y, seen = torch.ones(6), torch.tensor([1, 1, 1, 0, 1, 1]).bool()
    with pytest.raises(NotImplementedError, match=r"'y_unobserved' is masked in part.*obs_mask="):
        AutoBoostedFlow(missing)(y, seen)
    with pytest.raises(ValueError, match="the model masks 'y_unobserved' where the guide scores"):
        report((missing, AutoNormal(missing)), y, seen, num_samples=20)
    found = boost((masked, AutoBoostedFlow(masked, 1)), (y, seen), steps=20, seed=0)
    cov = torch.eye(5) + 1.0
    exact = dist.MultivariateNormal(torch.zeros(5), cov).log_prob(torch.ones(5))
    assert found.bound.value == pytest.approx(float(exact), abs=0.01)


@pytest.mark.parametrize(("seed", "late"), [(0, False), (1, False), (2, True)])
def test_a_model_that_branches_on_its_values_takes_one_draw_at_a_time(seed, late):
    """It is seen at the start, or where the first few draws go one way, by a later table."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        shift = 1.0 if bool((z.abs() > 0.8).any()) else 0.0
        pyro.sample("y", dist.Normal(z + shift, 0.5), obs=y)

    y, z = torch.tensor(0.9), torch.linspace(-8, 8, 16_001)
    mean = z + (z.abs() > 0.8).float()
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(mean, 0.5).log_prob(y)
    evidence = float(torch.trapezoid(log_p.double().exp(), z.double()).log())
    guide = AutoBoostedFlow(model, components=2, init="none", flow="affine")
    with pytest.warns(UserWarning, match="one draw at a time") if late else nullcontext():
        found = boost((model, guide), y, steps=20, num_samples=100, finetune=0, seed=seed)
    assert found.bound.value < evidence + 4 * found.bound.error


def test_a_list_finds_the_far_mode_though_the_others_have_moved():
    """Places found at the start are as wide as the other members were wrong then."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        scale = pyro.sample("scale", dist.LogNormal(1.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc**2, scale), obs=x)

    torch.manual_seed(0)
    x = 4.0 + torch.randn(60)
    for seed in (1, 2):
        pyro.set_rng_seed(seed)
        guide = AutoGuideList(model)
        guide.append(AutoBoostedFlow(poutine.block(model, expose=["loc"]), components=2))
        guide.append(AutoNormal(poutine.block(model, expose=["scale"])))
        boost((model, guide), x, steps=300, lr=0.02, finetune=0, seed=seed)
        draws = guide[0].get_posterior().sample((4000,))
        # Where the scale is off, weights are; each mode has a component all the same.
        assert 0.2 < float((draws > 0).float().mean()) < 0.8


@pytest.mark.parametrize("init", ["pathfinder", "none"])
def test_an_improper_prior_needs_no_draw(init):
    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.less_than(2.0), (), ()))
        pyro.factor("f", -0.5 * z**2)

    start = init_to_value(values={"z": torch.tensor(0.0)})
    guide = AutoBoostedFlow(model, components=2, init=init, init_loc_fn=start)
    found = boost((model, guide), steps=60, seed=0)
    exact = math.log(math.sqrt(2 * math.pi) * 0.97725)
    assert exact - 0.1 < found.bound.value < exact + 4.5 * found.bound.error


def test_nan_in_the_data_is_named():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(RuntimeError, match=r"from none of the starts.*site 'y'.*mend the data"):
        AutoBoostedFlow(model)(torch.tensor([1.0, math.nan]))


def test_svi_trains_a_flow_that_took_the_place_of_another():
    """The param store has old tensors under the names of new ones; they are not what is used."""

    def steps(guide):
        svi = SVI(squared, guide, Adam({"lr": 0.01}), Trace_ELBO())
        return [svi.step(torch.tensor(4.0)) for _ in range(3)]

    guide = AutoBoostedFlow(squared, components=2)
    steps(guide)
    boost((squared, guide), torch.tensor(4.0), steps=20, seed=0)
    guide.components.restart(1)
    guide.components.weights[:] = torch.tensor([0.0, 1.0])
    for one in (guide, AutoBoostedFlow(squared, components=1)):
        one(torch.tensor(4.0))
        flow = one.components.flows[-1]
        before = [p.detach().clone() for p in flow.parameters()]
        steps(one)
        assert all(not torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))


def test_a_guide_is_pickled_with_its_model_or_without():
    def local(y):
        squared(y)

    for model, whole in ((squared, True), (local, False)):
        guide = AutoBoostedFlow(model, components=2)
        boost((model, guide), torch.tensor(4.0), steps=20, seed=0)
        twin = pickle.loads(pickle.dumps(guide))
        points = torch.randn(5, 1)
        expected = guide.get_posterior().log_prob(points)
        assert torch.equal(twin.get_posterior().log_prob(points), expected)
        assert set(twin(torch.tensor(4.0))) == {"z"}
        assert guide.log_density(points, torch.tensor(4.0)).isfinite().all()  # it keeps its own
        if whole:
            assert twin.log_density(points, torch.tensor(4.0)).isfinite().all()
        else:
            with pytest.raises(RuntimeError, match=r"unpickled without its model.*state_dict"):
                twin.log_density(points, torch.tensor(4.0))


def test_it_is_rendered():
    pytest.importorskip("graphviz")
    guide = AutoBoostedFlow(squared, components=2)
    guide(torch.tensor(4.0))
    assert "z" in pyro.render_model(guide, model_args=(torch.tensor(4.0),)).source


@pytest.mark.parametrize("pair", [squared, [squared, squared], (squared, squared, 1)])
def test_what_is_no_pair_is_refused(pair):
    with pytest.raises(TypeError, match=r"boost: got .* for a pair; pass a meta-model, or a tuple"):
        boost(pair, torch.tensor(4.0), steps=10)


def test_a_list_is_one_argument():
    def model(parts):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i, part in enumerate(parts):
            pyro.sample(f"y{i}", dist.Normal(z, 1.0), obs=part)

    data = [torch.tensor(1.0), torch.tensor(2.0)]
    found = boost((model, AutoBoostedFlow(model, components=1)), data, steps=10, seed=0)
    exact = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1.0).log_prob(torch.stack(data))
    assert found.bound.value == pytest.approx(float(exact), abs=0.01)
