"""Many runs at once are runs: each has the values and densities that it would have alone."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyroboost.evaluation import _together
from pyroboost.evaluation._traces import Subject
from pyroboost.program import Program

X = torch.linspace(-1.0, 1.0, 5)


class Counted:
    def __init__(self, program):
        self.program, self.calls = program, 0

    def __call__(self, *args):
        self.calls += 1
        return self.program(*args)


def positive(x):
    """A constrained site, a plate of hidden values, one of them masked, and a computed value."""
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, s))
        pyro.deterministic("double", 2 * z)
        with pyro.poutine.mask(mask=torch.arange(len(x)) > 0):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def bare(x):
    """Dimensions of data that no plate declares."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def mixed_up(x):
    """Runs at once would share a sum over all of them."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(), 1.0).expand(x.shape).to_event(1), obs=x)


def indexed(x):
    """The first dimension is taken for that of the vector."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z[0], z[1].exp()).expand(x.shape).to_event(1), obs=x)


def pair(model, make):
    guide, counted = make(model), Counted(model)
    guide(X)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.1 * torch.randn_like(p))
    programs = Program(counted, "model"), Program(guide, "guide")
    return Subject(*programs, programs, "x", None, counted), guide, counted


def density(model, run):
    """The sites' log densities, by a trace conditioned on the run's values."""
    values = {name: site["value"] for name, site in run.model.items() if not site["is_observed"]}
    trace = pyro.poutine.trace(pyro.condition(model, values)).get_trace(X)
    trace.compute_log_prob()
    return {name: trace.nodes[name]["unscaled_log_prob"] for name in run.model}


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize(
    ("model", "at_once"), [(positive, True), (bare, True), (mixed_up, False), (indexed, False)]
)
def test_each_run_is_one(model, at_once, make):
    item, guide, counted = pair(model, make)
    counted.calls = 0
    made = list(_together.runs(item, (X,), 30))
    assert len(made) == 30
    assert (counted.calls < 10) == at_once
    assert len({float(run.model["z"]["value"].sum()) for run in made}) == 30
    for run in made:
        for name, expected in density(model, run).items():
            found = run.model[name]["unscaled_log_prob"]
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, atol=1e-5)
        if "double" in run.computed:
            assert torch.equal(run.computed["double"]["value"], 2 * run.model["z"]["value"])
    if make is AutoMultivariateNormal:
        law = guide.get_posterior()
        for run in made:
            site = run.guide["_AutoMultivariateNormal_latent"]
            expected = law.log_prob(site["value"])
            assert torch.allclose(site["unscaled_log_prob"], expected, atol=1e-5)


def test_given_values_in_blocks(monkeypatch):
    monkeypatch.setattr(_together, "_BLOCK", 7)
    item, _, _ = pair(positive, AutoNormal)
    (first,) = _together.runs(item, (X,), 1)
    s, z = torch.rand(20) + 0.5, torch.randn(20, 5)
    inner = {"s_unconstrained": s.log(), "z_unconstrained": z}
    made = _together.runs_at(item, (X,), first, inner, {"s": s, "z": z})
    assert made is not None
    assert len(made) == 20
    assert torch.equal(torch.stack([run.model["z"]["value"] for run in made]), z)
    for run, scale, value in zip(made, s, z, strict=True):
        expected = dist.Normal(0.0, scale).log_prob(value)
        assert torch.allclose(run.model["z"]["unscaled_log_prob"], expected, atol=1e-5)
