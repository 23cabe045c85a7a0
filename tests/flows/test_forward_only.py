"""Flows that run forwards only: determinants, constraints, and where they are refused."""

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from flow_cases import log_det_by_autograd, normal, points

from pyroboost import flows
from pyroboost.distributions import BoostedFlow, Components, FlowLaw
from pyroboost.flows import InverseAutoregressive, Planar, Radial, Sylvester, check_invertible
from pyroboost.flows.sylvester import orthonormal

FORWARD = {
    "planar": flows.planar,
    "radial": flows.radial,
    "orthogonal": lambda dim, steps, **kw: flows.sylvester(
        dim, steps, vectors=(dim + 1) // 2, **kw
    ),
    "householder": lambda dim, steps, **kw: flows.sylvester(
        dim, steps, "householder", vectors=3, **kw
    ),
    "triangular": lambda dim, steps, **kw: flows.sylvester(dim, steps, "triangular", **kw),
}
ALL = {**FORWARD, "iaf": lambda dim, steps, **kw: flows.iaf(dim, steps, units=12, **kw)}
SHAPES = [(2, 1), (3, 2), (5, 3)]


def make(name, dim, steps, *, context=0, spread=0.7, seed=0):
    torch.manual_seed(seed)
    return ALL[name](dim, steps, context=context, spread=spread).double()


@pytest.mark.parametrize(("dim", "steps"), SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_log_determinants_are_those_of_autograd(name, dim, steps):
    for seed in range(3):
        flow, x = make(name, dim, steps, seed=seed), points(20, dim)
        with torch.no_grad():
            expected = log_det_by_autograd(lambda row, flow=flow: flow(row)[0], x)
            assert torch.allclose(flow(x)[1], expected, atol=1e-9)
        assert expected.abs().max() > 0.01


@pytest.mark.parametrize("name", ["planar", "radial"])
def test_one_dimension(name):
    flow, x = make(name, 1, 3), points(9, 1)
    expected = log_det_by_autograd(lambda row: flow(row)[0], x)
    assert torch.allclose(flow(x)[1], expected, atol=1e-9)


@pytest.mark.parametrize("name", FORWARD)
def test_large_coefficients_stay_invertible(name):
    """The constraints hold for all numbers: lines through space never fold back."""
    flow = make(name, 3, 1, spread=8.0)
    x = points(4000, 3) * 2
    log_det = flow(x)[1]
    assert log_det.isfinite().all()
    # f is one-to-one: no two points of a fine grid change places along the line w.
    if name == "planar":
        step = flow.steps[0]
        w = step.coefficients()[:3]
        line = torch.linspace(-3, 3, 5001, dtype=torch.float64)[:, None] * w / w.norm()
        assert (((step.push(line)[0]) @ w).diff() > 0).all()
    if name == "radial":
        step = flow.steps[0]
        away = torch.linspace(0, 5, 5001, dtype=torch.float64)[:, None]
        ray = step.coefficients()[:3] + away * torch.tensor([0.6, 0.8, 0.0])
        r = (step.push(ray)[0] - step.coefficients()[:3]).norm(dim=-1)
        assert (r.diff() > 0).all()


@pytest.mark.parametrize("kind", ["orthogonal", "householder", "triangular"])
def test_sylvester_is_the_written_formula(kind):
    """x + Q R1 tanh(R2 Q'x + b) with triangular R, by hand and row by row."""
    torch.manual_seed(1)
    step = Sylvester(4, kind, vectors=3, flip=True, context=2, spread=0.6).double()
    x, context = points(5, 4), points(5, 2, seed=4)
    y, log_det = step.push(x, context)
    width = 3 if kind == "orthogonal" else 4
    for i in range(5):
        numbers = step.coefficients(context[i])
        square, rest = numbers[: width**2].reshape(width, width), numbers[width**2 :]
        d1, d2, b = rest[:width].tanh(), rest[width : 2 * width].tanh(), rest[2 * width : 3 * width]
        r1 = torch.triu(square, 1) + torch.diag(d1)
        r2 = torch.tril(square, -1).T + torch.diag(d2)
        q = step.directions(context[i])
        assert torch.allclose(q.T @ q, torch.eye(width, dtype=q.dtype), atol=1e-12)
        by_hand = x[i] + q @ r1 @ torch.tanh(r2 @ q.T @ x[i] + b)
        assert torch.allclose(y[i], by_hand, atol=1e-12)
        exact = log_det_by_autograd(lambda row, c=context[i]: step.push(row, c)[0], x[i : i + 1])
        assert torch.allclose(log_det[i], exact, atol=1e-9)


def test_triangular_steps_reverse_the_coordinates_in_turn():
    flow = flows.sylvester(3, 3, "triangular")
    eye = torch.eye(3)
    for step, q in zip(flow.steps, (eye, eye.flip(0), eye), strict=True):
        assert torch.equal(step.directions(), q)


def test_orthonormal_to_rounding_with_its_gradient():
    """Against the polar factor U V' of the singular value decomposition."""
    torch.manual_seed(0)
    raw = torch.randn(7, 5, 3, dtype=torch.float64, requires_grad=True)
    q = orthonormal(raw)
    assert torch.allclose(q.mT @ q, torch.eye(3, dtype=q.dtype).expand(7, 3, 3), atol=1e-14)
    u, _, vh = torch.linalg.svd(raw, full_matrices=False)
    assert torch.allclose(q, u @ vh, atol=1e-12)
    probe = torch.randn_like(raw)
    (ours,) = torch.autograd.grad((q * probe).sum(), raw)
    (exact,) = torch.autograd.grad(((u @ vh) * probe).sum(), raw)
    assert torch.allclose(ours, exact, atol=1e-8)
    single = orthonormal(torch.randn(64, 32))
    assert torch.allclose(single.mT @ single, torch.eye(32), atol=2e-5)
    with pytest.raises(ValueError, match="linearly dependent"):
        orthonormal(torch.zeros(5, 2).index_fill(1, torch.tensor([0]), 1.0))


@pytest.mark.parametrize("name", FORWARD)
def test_a_spread_of_zero_is_the_identity(name):
    x = points(6, 4)
    z, log_det = make(name, 4, 2, spread=0.0)(x)
    assert torch.allclose(z, x, atol=1e-15)
    assert torch.allclose(log_det, torch.zeros(6, dtype=x.dtype), atol=1e-15)


@pytest.mark.parametrize("name", ALL)
def test_amortised_rows_go_by_their_own_context(name):
    flow = make(name, 3, 2, context=4)
    context, x = points(6, 4, seed=5), points(18, 3).reshape(3, 6, 3)
    z, log_det = flow(x, context)
    assert log_det.shape == (3, 6)
    for i in range(6):
        alone, alone_log_det = flow(x[:, i], context[i])
        assert torch.allclose(z[:, i], alone)
        assert torch.allclose(log_det[:, i], alone_log_det)
    assert not torch.allclose(z, flow(x, context.roll(1, 0))[0])


@pytest.mark.parametrize("name", ALL)
def test_every_coefficient_has_a_gradient_and_copies_are_apart(name):
    flow = make(name, 3, 2, context=2)
    z, log_det = flow(points(30, 3), points(30, 2, seed=3))
    loss = z.square().sum() - log_det.sum()
    found = torch.autograd.grad(loss, list(flow.parameters()))
    assert all(g.abs().sum() > 0 for g in found)
    twin = copy.deepcopy(flow)
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert not torch.equal(next(twin.parameters()), next(flow.parameters()))


@pytest.mark.parametrize("name", FORWARD)
def test_refused_as_components_by_name(name):
    flow = make(name, 3, 2)
    label = flow.steps[0].label
    assert not flow.invertible
    with pytest.raises(
        ValueError, match=rf"step {label} has no inverse in closed form, .* flows.realnvp"
    ):
        check_invertible(flow, allow_slow=True)
    with pytest.raises(ValueError, match=rf"component 0: flow '{flow.name}': step {label}"):
        Components(lambda: flow, 2)
    with pytest.raises(ValueError, match=f"step {label} has no inverse"):
        flow.inverse(points(2, 3))


def test_iaf_is_exact_both_ways_and_boosted_on_request():
    flow, x = make("iaf", 5, 3, context=2), points(12, 5)
    context = points(12, 2, seed=9)
    z, log_det = flow(x, context)
    back, log_det_back = flow.inverse(z, context)
    assert torch.allclose(back, x, atol=1e-9)
    assert torch.allclose(log_det + log_det_back, torch.zeros_like(log_det), atol=1e-9)
    with pytest.raises(ValueError, match=r"5 passes of its network .* allow_slow=True"):
        check_invertible(flow)
    check_invertible(flow, allow_slow=True)


def test_iaf_sees_earlier_coordinates_only():
    torch.manual_seed(0)
    step = InverseAutoregressive(5, units=7, spread=1.0).double()
    jacobian = torch.func.jacrev(lambda row: step.push(row)[0])(points(1, 5)[0])
    assert (jacobian.triu(1) == 0).all()
    assert (jacobian.tril(-1).abs().sum(1)[1:] > 0).all(), "each later one sees those before it"


def law_of(flow, rows=4, context=None):
    loc = torch.linspace(-1, 1, rows * flow.dim, dtype=torch.float64).reshape(rows, flow.dim)
    return FlowLaw(dist.Normal(loc, 0.5).to_event(1), flow, context=context)


@pytest.mark.parametrize("name", ALL)
def test_own_draws_are_scored_by_the_change_of_variables(name):
    """E_q p(z) / q(z) = 1 for a narrower normal law p: q is a density."""
    law = law_of(make(name, 2, 2, spread=0.4), rows=1)
    z = law.sample((40_000,))
    narrow = (z - z.mean(0)) / 0.25
    weight = (normal(narrow) - 2 * math.log(0.25) - law.log_prob(z)).exp().flatten()
    assert abs(weight.mean() - 1) < 5 * weight.std() / 200
    assert weight.std() / 200 < 0.05


def test_only_the_last_draw_itself_is_scored():
    law = law_of(make("planar", 3, 2))
    first, second = law.rsample((5,)), law.rsample((5,))
    assert law.log_prob(second).shape == (5, 4)
    for foreign in (first, second.clone(), second.detach()):
        with pytest.raises(ValueError, match=r"flow 'planar' has no inverse .* flows.realnvp"):
            law.log_prob(foreign)
    with pytest.raises(ValueError, match="has no inverse"):
        law.expand((5, 4)).log_prob(second)
    with torch.no_grad():
        drawn = law.sample()
        drawn += 1.0
        with pytest.raises(ValueError, match="has no inverse"):
            law.log_prob(drawn)


@pytest.mark.parametrize("name", ["realnvp", "iaf"])
def test_invertible_flows_score_all_points_as_a_mixture_of_one(name):
    flow = flows.realnvp(3, 2, spread=0.5) if name == "realnvp" else flows.iaf(3, 2, spread=0.5)
    law = law_of(flow.double())
    z = law.rsample((7,))
    own = law.log_prob(z)
    assert torch.allclose(law.log_prob(z.clone()), own)
    mixture = BoostedFlow(law.base, [flow], allow_slow=True)
    assert torch.allclose(mixture.log_prob(z), own)
    assert torch.allclose(law.expand((2, 4)).log_prob(z[:2]), own[:2])


def test_the_laws_gradient_is_pathwise():
    """d/dtheta E log q(z) of own draws against finite differences of the same noise."""
    flow = make("planar", 2, 1)
    parameter = flow.steps[0].coefficients.bias

    def value():
        torch.manual_seed(3)
        law = law_of(flow)
        z = law.rsample((50,))
        return (law.log_prob(z) + z.square().sum(-1)).mean()

    (found,) = torch.autograd.grad(value(), parameter)
    for i in range(len(parameter)):
        with torch.no_grad():
            parameter[i] += 1e-6
            above = value()
            parameter[i] -= 2e-6
            below = value()
            parameter[i] += 1e-6
        assert abs((above - below) / 2e-6 - found[i]) < 1e-5


def test_refusals():
    with pytest.raises(ValueError, match="kind is 'lower'"):
        Sylvester(3, "lower")
    with pytest.raises(ValueError, match="vectors is 4 in 3 dimensions"):
        Sylvester(3, vectors=4)
    with pytest.raises(ValueError, match=r"flows\.planar: steps is 0"):
        flows.planar(2, 0)
    with pytest.raises(ValueError, match=r"flows\.sylvester: steps is 0"):
        flows.sylvester(2, 0, vectors=2)
    with pytest.raises(ValueError, match=r"flows\.iaf: steps is 0"):
        flows.iaf(2, 0)
    with pytest.raises(ValueError, match="units is 0"):
        InverseAutoregressive(3, units=0)
    with pytest.raises(ValueError, match="at least 2"):
        InverseAutoregressive(1)
    with pytest.raises(TypeError, match="flow is Planar"):
        FlowLaw(dist.Normal(torch.zeros(2), 1.0).to_event(1), Planar(2))
    with pytest.raises(ValueError, match=r"event shape \(3,\) and flow 'radial' is of dimension 2"):
        FlowLaw(dist.Normal(torch.zeros(3), 1.0).to_event(1), flows.radial(2, 1))
    with pytest.raises(ValueError, match="needs a context of width 4, and none came"):
        FlowLaw(dist.Normal(torch.zeros(2), 1.0).to_event(1), flows.radial(2, 1, context=4))
    with pytest.raises(ValueError, match="give one row for each"):
        FlowLaw(
            dist.Normal(torch.zeros(3, 2), 1.0).to_event(1),
            flows.radial(2, 1, context=4),
            context=torch.zeros(5, 4),
        )
    assert Radial(2).refusal == "has no inverse in closed form"
