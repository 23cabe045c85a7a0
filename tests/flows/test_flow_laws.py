"""Every flow runs both ways, and says how it changes volume."""

import copy

import pytest
import torch
from flow_cases import BUILD, COUPLED, log_density, log_det_by_autograd, make, points, train

from pyroboost import flows

SHAPES = [(1, 2), (2, 2), (3, 1), (3, 2), (4, 1), (5, 3)]  # dimension and depth, odd and even
CASES = [
    pytest.param(name, dim, depth, id=f"{name}-{dim}d-{depth}")
    for name in BUILD
    for dim, depth in SHAPES
    if dim > 1 or name not in COUPLED
]


def check_laws(flow, x, context=None):
    z, log_det = flow(x, context)
    back, log_det_back = flow.inverse(z, context)
    assert torch.allclose(back, x, atol=1e-7, rtol=0)
    assert torch.allclose(log_det + log_det_back, torch.zeros_like(log_det), atol=1e-7)
    source, log_det_source = flow.inverse(x, context)
    again, log_det_again = flow(source, context)
    assert torch.allclose(again, x, atol=1e-7, rtol=0)
    assert torch.allclose(log_det_again, -log_det_source, atol=1e-7)
    assert log_det.shape == log_det_source.shape == x.shape[:-1]


@pytest.mark.parametrize(("name", "dim", "depth"), CASES)
def test_both_ways(name, dim, depth):
    flow = make(name, dim, depth)
    x = points(50, dim)
    check_laws(flow, x)
    losses = train(flow)
    if name != "householder":  # a rotation of a standard normal changes nothing
        assert losses[-1] < losses[0]
    check_laws(flow, x)


@pytest.mark.parametrize(("name", "dim", "depth"), CASES)
def test_log_determinants_are_those_of_autograd(name, dim, depth):
    flow = make(name, dim, depth)
    train(flow, steps=2)
    x = points(7, dim)
    with torch.no_grad():
        for way in (flow.forward, flow.inverse):
            expected = log_det_by_autograd(lambda row, way=way: way(row)[0], x)
            assert torch.allclose(way(x)[1], expected, atol=1e-8)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", BUILD)
def test_densities_integrate_to_one(name, depth, trained):
    flow = make(name, 2, depth, spread=0.3)
    if trained:
        train(flow, steps=10)
    axis = torch.linspace(-12, 12, 201, dtype=torch.float64)
    with torch.no_grad():
        total = log_density(flow, torch.cartesian_prod(axis, axis)).exp().sum() * 0.12**2
    assert abs(total - 1) < (2e-3 if name == "spline" else 1e-5)  # a spline's density has kinks


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("name", BUILD)
def test_amortised_flows(name, dim):
    """Each row goes by its own context, also under samples, and the laws hold."""
    flow = make(name, dim, 2, context=4)
    context = points(6, 4, seed=5)
    train(flow, steps=2, context=context)
    x = points(18, dim).reshape(3, 6, dim)
    check_laws(flow, x, context)
    z, log_det = flow(x, context)
    for i in range(6):
        alone, alone_log_det = flow(x[:, i], context[i])
        assert torch.allclose(z[:, i], alone)
        assert torch.allclose(log_det[:, i], alone_log_det)
    swapped = flow(x, context.flip(0))[0]
    assert float((swapped - z).detach().abs().max()) > 1e-3
    expected = torch.stack(
        [log_det_by_autograd(lambda r, i=i: flow(r, context[i])[0], x[:, i]) for i in range(6)], 1
    )
    assert torch.allclose(log_det, expected, atol=1e-8)
    # One set of points under many contexts
    assert flow(x[0, :1], context)[0].shape == (6, dim)
    assert flow.inverse(x[0, 0], context)[1].shape == (6,)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("name", BUILD)
def test_a_spread_of_zero_is_the_identity(name, context):
    x, given = points(20, 3), points(20, 3, seed=4) if context else None
    for spread, tolerance in ((0.0, 1e-12), (0.01, 0.5)):
        flow = make(name, 3, 1, spread=spread, context=context)
        steps = [s for s in flow.steps if s.label != "Permutation"]
        z, log_det = flows.Flow(steps)(x, given)
        assert torch.allclose(z, x, atol=tolerance)
        assert torch.allclose(log_det, torch.zeros(20, dtype=x.dtype), atol=tolerance)


@pytest.mark.parametrize("name", BUILD)
def test_every_parameter_learns(name):
    flow = make(name, 3, 2, context=2)
    target = points(30, 3, seed=3)  # a square loss: a likelihood would not see rotations
    for way in (flow.forward, flow.inverse):
        z, log_det = way(points(30, 3), points(30, 2, seed=8))
        ((z - target) ** 2).mean().add(log_det.mean()).backward()
        for parameter in flow.parameters():
            assert parameter.grad.abs().sum() > 0
        flow.zero_grad()


@pytest.mark.parametrize("name", BUILD)
def test_copies_and_states(name):
    """A used flow can be copied, the copy trains alone, and a state brings a flow back."""
    flow = make(name, 3, 2)
    x = points(10, 3)
    before = log_density(flow, x)
    twin = copy.deepcopy(flow)
    assert torch.equal(log_density(twin, x), before)
    train(twin, steps=2)
    assert torch.equal(log_density(flow, x), before)
    if name != "householder":
        assert not torch.allclose(log_density(twin, x), before)
    fresh = make(name, 3, 2, seed=9)
    fresh.load_state_dict(flow.state_dict())
    assert torch.equal(log_density(fresh, x), before)
    single = copy.deepcopy(flow).float()
    assert torch.allclose(log_density(single, x.float()).double(), before, atol=2e-2)
    assert single.inverse(x.float())[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["nlsq", "spline"])
def test_inverses_carry_second_derivatives(name):
    """The roots are found without a graph, and the steps that polish them bring it back."""
    flow = make(name, 1, 1)
    x = points(4, 1).requires_grad_()
    parameters = tuple(flow.parameters())

    def inverse(value, *values):
        names = [f"flow.{name}" for name, _ in flow.named_parameters()]
        state = dict(zip(names, values, strict=True))
        z0, log_det = torch.func.functional_call(Backwards(flow), state, (value,))
        return torch.cat([z0.flatten(), log_det])

    assert torch.autograd.gradcheck(inverse, (x, *parameters))
    assert torch.autograd.gradgradcheck(inverse, (x, *parameters))


class Backwards(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, z):
        return self.flow.inverse(z)
