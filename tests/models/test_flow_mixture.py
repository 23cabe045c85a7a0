"""The mixture of flows: exact density and guide, and where it goes."""

import copy
import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate

from pyroboost import flows
from pyroboost.compose import Cascade, Mixture, Product
from pyroboost.data import plane_grid
from pyroboost.evaluation import log_weights, to_arviz
from pyroboost.infer import fit as fit_pair
from pyroboost.models import VAE, FlowMixture

DOUBLE = torch.float64
SMALL = partial(flows.realnvp, steps=1, units=8, spread=0.2)


def make(count=3, weights=(0.5, 0.2, 0.3), **options):
    """A mixture in double precision, far from the identity, at another place and scale."""
    mixture = FlowMixture(2, count, SMALL, **options).double()
    mixture.weights = torch.tensor(weights)
    mixture.components.loc.copy_(torch.tensor([0.5, -0.3]))
    mixture.components.scale.copy_(torch.tensor([1.5, 0.7]))
    return mixture


def by_hand(mixture, x):
    """log w_c g_c(x) by torch's own change of variables.  # (N, C)"""
    parts, base, found = mixture.components, dist.Normal(0.0, 1.0), []
    for c, flow in enumerate(parts.flows.flows):
        y = (x - parts.loc) / parts.scale
        z0 = flow.inverse(y)[0]
        jacobian = torch.func.vmap(torch.func.jacrev(lambda v, f=flow: f.inverse(v)[0]))(y)
        log_g = base.log_prob(z0).sum(-1) + jacobian.det().abs().log() - parts.scale.log().sum()
        found.append(log_g + mixture.weights[c].log())
    return torch.stack(found, -1)


def test_density_posterior_and_joint_are_those_by_hand():
    mixture, x = make(), torch.randn(20, 2, dtype=DOUBLE)
    joint = by_hand(mixture, x)
    found = mixture.log_marginal(x)
    assert found.kind == "exact"
    torch.testing.assert_close(found.value, joint.logsumexp(-1))
    torch.testing.assert_close(mixture.responsibilities(x), joint.softmax(-1))
    c = torch.randint(3, (20,))
    program = poutine.condition(mixture.model, data={"component": c})
    trace = poutine.trace(program).get_trace(x)
    torch.testing.assert_close(trace.log_prob_sum(), joint[torch.arange(20), c].sum())
    marginal = poutine.trace(mixture.marginal).get_trace(x)
    torch.testing.assert_close(marginal.log_prob_sum(), joint.logsumexp(-1).sum())
    torch.testing.assert_close(mixture.log_prior(c).value, mixture.weights.log()[c])
    alone = mixture.component(1).log_marginal(x).value
    torch.testing.assert_close(alone, joint[:, 1] - mixture.weights[1].log())


def test_the_density_integrates_to_one():
    mixture, grid = make(), plane_grid(20.0, 500, dtype=DOUBLE)
    value = grid.evaluate(lambda x: mixture.log_marginal(x).value)
    assert grid.log_integral(value) == pytest.approx(0.0, abs=1e-4)


def test_draws_have_the_density():
    """E_m[1 / m(x)] over a square is its area; means agree with the grid's."""
    mixture, grid = make(), plane_grid(20.0, 500, dtype=DOUBLE)
    density = grid.evaluate(lambda x: mixture.log_marginal(x).value).exp()
    mean = (density[:, None] * grid.points).sum(0) * math.exp(grid.log_cell)
    square = (density[:, None] * grid.points**2).sum(0) * math.exp(grid.log_cell)
    x = mixture.sample(20_000)
    error = x.std(0) / math.sqrt(len(x))
    assert ((x.mean(0) - mean).abs() < 4.5 * error).all()
    spread = (x**2).std(0) / math.sqrt(len(x))
    assert (((x**2).mean(0) - square).abs() < 4.5 * spread).all()
    drawn = Predictive(mixture.marginal, num_samples=3)(torch.zeros(5, 2, dtype=DOUBLE))
    assert drawn["x"].shape == (3, 5, 2)


def test_every_importance_weight_is_the_likelihood():
    mixture, x = make(weights=(0.5, 0.0, 0.5)), torch.randn(9, 2, dtype=DOUBLE)
    expected = mixture.log_marginal(x).value.detach()
    torch.testing.assert_close(log_weights(mixture, x, num_samples=4), expected.expand(4, -1))


def test_the_guide_enumerates_to_the_exact_loss():
    mixture, x = make(), torch.randn(6, 2, dtype=DOUBLE)
    every = config_enumerate(mixture.guide, "parallel")
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(mixture.model, every, x)
    exact = mixture.objective()(None, None, x)
    torch.testing.assert_close(loss, exact)
    parameters = list(mixture.components.flows.parameters())
    for one, other in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(exact, parameters), strict=True
    ):
        torch.testing.assert_close(one, other)
    weights = torch.rand(6, dtype=DOUBLE)
    weighed = mixture.objective()(None, None, x, weights=weights)
    torch.testing.assert_close(weighed, -(weights * mixture.log_marginal(x).value).sum())


def test_a_component_of_weight_zero_costs_nothing_and_gets_nothing():
    mixture, x = make(weights=(0.4, 0.0, 0.6)), torch.randn(5, 2, dtype=DOUBLE)
    mixture.components.flows.flows[1].forward = None  # whoever runs it fails
    mixture.components.flows.flows[1].inverse = None
    mixture.log_marginal(x).value.sum().backward()
    assert all(p.grad is None for p in mixture.components.flows.flows[1].parameters())
    assert mixture.responsibilities(x)[:, 1].eq(0).all()
    assert set(mixture.encode(x).tolist()) <= {0, 2}


def test_one_component_may_have_another_base():
    heavy = FlowMixture(2, 1, SMALL, base=lambda z: dist.StudentT(3.0, z, 1.0).to_event(1))
    far = torch.full((1, 2), 30.0)
    normal = FlowMixture(2, 1, SMALL)
    normal.load_state_dict(heavy.state_dict())
    assert heavy.log_marginal(far).mean > normal.log_marginal(far).mean + 100


def test_copies_files_and_types_keep_the_density(tmp_path):
    mixture, x = make(), torch.randn(7, 2, dtype=DOUBLE)
    expected = mixture.log_marginal(x).value.detach()
    mixture.save(tmp_path / "m.pt")
    other = FlowMixture(2, 3, SMALL).double().load(tmp_path / "m.pt")
    torch.testing.assert_close(other.log_marginal(x).value.detach(), expected)
    twin = copy.deepcopy(mixture)
    fit_pair(twin, torch.randn(50, 2, dtype=DOUBLE), epochs=1)
    torch.testing.assert_close(mixture.log_marginal(x).value.detach(), expected)
    assert not torch.allclose(twin.log_marginal(x).value.detach(), expected)
    alone = mixture.component(1)
    lone = alone.log_marginal(x).value.detach()
    copied = copy.deepcopy(alone)
    copied.fit(torch.randn(50, 2, dtype=DOUBLE), steps=2, seed=0)
    torch.testing.assert_close(alone.log_marginal(x).value.detach(), lone)
    alone.fit(torch.randn(50, 2, dtype=DOUBLE), steps=2, seed=0)  # a fresh start of its own
    torch.testing.assert_close(mixture.log_marginal(x).value.detach(), expected)
    single = mixture.float().log_marginal(x.float()).value.detach()
    torch.testing.assert_close(single.double(), expected, atol=1e-4, rtol=1e-4)


def test_it_goes_where_meta_models_go():
    x = torch.randn(6, 2)
    one, other = FlowMixture(2, 1, SMALL), FlowMixture(2, 1, SMALL)
    m = torch.stack([p.log_marginal(x).value for p in (one, other)], -1)
    mixed = Mixture(one, other, weights=[0.3, 0.7]).log_marginal(x)
    expected = (m + torch.tensor([0.3, 0.7]).log()).logsumexp(-1)
    torch.testing.assert_close(mixed.value, expected)
    product = Product(one, other, powers=[0.5, 2.0]).log_density(x)
    torch.testing.assert_close(product.value, m @ torch.tensor([0.5, 2.0]), atol=1e-5, rtol=1e-5)
    vae = VAE(5, 2, units=4)
    cascade = Cascade(vae, one)
    bits = torch.randint(2, (6, 5)).float()
    trace = poutine.trace(cascade.guide).get_trace(bits)
    joint = poutine.trace(poutine.replay(cascade.model, trace=trace)).get_trace(bits)
    z = next(n["value"] for n in trace.nodes.values() if n.get("value") is not None
             and getattr(n["value"], "shape", None) == (6, 2))  # fmt: skip
    assert z.isfinite().all()
    assert float(joint.log_prob_sum().detach()) < 0
    elbo = Trace_ELBO().differentiable_loss(cascade.model, cascade.guide, bits)
    elbo.backward()
    assert all(p.grad is not None for p in one.parameters())


def test_draws_go_to_arviz():
    mixture, x = make(), torch.randn(6, 2, dtype=DOUBLE)
    found = to_arviz(mixture, x, num_samples=40)
    weight = torch.as_tensor(found["sample_stats"]["log_weight"].values)[0]
    expected = mixture.log_marginal(x).value.detach()
    torch.testing.assert_close(weight, expected.expand(40, 6))
    assert found["posterior"]["component"].shape == (1, 40, 6)


@pytest.mark.parametrize(
    ("kind", "call", "words"),
    [
        (ValueError, lambda m: m.fit(torch.ones(5, 3)), r"of shape \(N, 2\)"),
        (ValueError, lambda m: m.fit(torch.full((5, 2), math.nan)), "NaN or infinity"),
        (ValueError, lambda m: m.fit(torch.ones(5, 2), steps=1), "constant"),
        (TypeError, lambda m: m.fit([1.0]), "one tensor"),
        (TypeError, lambda m: m.fit(torch.ones(5, 2, dtype=torch.long)), "float32 or float64"),
        (ValueError, lambda m: m.fit(torch.randn(5, 2), steps=0), "steps is 0"),
        (ValueError, lambda m: m.fit(torch.randn(5, 2), ess=1.0), "ess is 1.0"),
        (ValueError, lambda m: m.fit(torch.randn(5, 2), epochs=3), "epochs has no meaning"),
        (ValueError, lambda m: m.fit(torch.randn(5, 2), start="here"), "start is 'here'"),
        (ValueError, lambda m: m.fit(torch.randn(5, 2), objective="kl"), "objective is 'kl'"),
        (ValueError, lambda m: m.fit(torch.randn(5, 2), weights=torch.ones(4)), "weights"),
        (
            ValueError,
            lambda m: m.fit(torch.randn(5, 2), validation_weights=torch.ones(4)),
            "without",
        ),
        (ValueError, lambda m: m.fit(torch.zeros(0, 2)), "shape"),
        (ValueError, lambda m: m.fit(torch.randn(1, 2)), "got 1 data"),
        (
            ValueError,
            lambda m: m.fit(torch.randn(3, 2), weights=torch.tensor([0.0, 1.0, 0.0])),
            "one datum alone",
        ),
        (
            ValueError,
            lambda m: m.fit(torch.randn(5, 2), validation=torch.full((5, 2), math.inf)),
            r"validation\): 5 of 5",
        ),
        (
            ValueError,
            lambda m: m.fit(torch.tensor([[0.0, 1e9], [1.0, 1e9], [2.0, 1e9]])),
            r"columns \[1\]",
        ),
        (ValueError, lambda m: m.fit(torch.randn(5, 2), annealing=2), "annealing has no meaning"),
        (ValueError, lambda m: m.log_marginal(torch.full((1, 2), math.nan)), "NaN or infinity"),
        (
            ValueError,
            lambda m: setattr(m, "weights", torch.tensor([math.inf, 1.0])),
            "no convex combination",
        ),
        (ValueError, lambda m: m.log_marginal(torch.zeros(3)), r"of shape \(N, 2\)"),
        (ValueError, lambda m: setattr(m, "weights", torch.tensor([1.0])), "no convex combination"),
        (ValueError, lambda m: FlowMixture(2, 0), "at least 1"),
        (ValueError, lambda m: FlowMixture(2, 3, [SMALL, SMALL]), "3"),
        (ValueError, lambda m: FlowMixture(2, 1, lambda d: flows.affine(3)), "another dimension"),
        (ValueError, lambda m: FlowMixture(2, 1, partial(flows.affine, context=2)), "context"),
        (TypeError, lambda m: FlowMixture(2, 1, lambda d: torch.nn.Linear(d, d)), "Linear"),
    ],
)
def test_bad_input_is_refused(kind, call, words):
    with pytest.raises(kind, match=words):
        call(FlowMixture(2, 2, SMALL))
