"""Flows of Pyro: taken where they run both ways, refused by name where they do not."""

import copy

import pyro.distributions.transforms as pyro_flows
import pytest
import torch
from flow_cases import log_det_by_autograd, points
from torch.distributions import constraints
from torch.distributions.transforms import AffineTransform, ExpTransform, Transform

from pyroboost.flows import Affine, Flow, check_invertible, realnvp

WITHOUT = {
    "Planar": lambda: pyro_flows.planar(2),
    "Radial": lambda: pyro_flows.radial(2),
    "Sylvester": lambda: pyro_flows.sylvester(2),
    "BlockAutoregressive": lambda: pyro_flows.block_autoregressive(2),
    "Polynomial": lambda: pyro_flows.polynomial(2),
    "NeuralAutoregressive": lambda: pyro_flows.neural_autoregressive(2),
    "BatchNorm": lambda: pyro_flows.BatchNorm(2),
}
GOOD = {
    "affine": lambda: pyro_flows.affine_coupling(2),
    "spline": lambda: pyro_flows.spline(2, order="quadratic"),
    "spline coupling": lambda: pyro_flows.spline_coupling(2),
    "matrix": lambda: pyro_flows.matrix_exponential(2),
    "householder": lambda: pyro_flows.householder(2),
    "permute": lambda: pyro_flows.permute(2, torch.tensor([1, 0])),
    "torch": lambda: AffineTransform(1.0, 2.0),
    "reverse": lambda: pyro_flows.affine_coupling(2).inv,
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", WITHOUT)
def test_flows_without_an_inverse_are_refused_by_name(name, turned):
    transform = WITHOUT[name]()
    flow = Flow([Affine(2), transform.inv if turned else transform], name="mine")
    assert not flow.invertible
    with pytest.raises(ValueError, match=rf"^here: flow 'mine': step {name} .* flows.realnvp"):
        check_invertible(flow, where="here", allow_slow=True)
    with pytest.raises(ValueError, match=name):
        flow.inverse(points(3, 2).float())


@pytest.mark.parametrize(
    "make", [pyro_flows.affine_autoregressive, pyro_flows.spline_autoregressive]
)
def test_autoregressive_flows_are_taken_on_request(make):
    flow = Flow([make(5)], dim=5)
    assert flow.invertible
    assert flow.slow
    with pytest.raises(ValueError, match=r"5 passes of its network .* allow_slow=True"):
        check_invertible(flow)
    check_invertible(flow, allow_slow=True)
    x = points(10, 5).float()
    z, log_det = flow(x)
    back, log_det_back = flow.inverse(z)
    assert torch.allclose(back, x, atol=1e-5)
    assert torch.allclose(log_det_back, -log_det, atol=1e-5)


@pytest.mark.parametrize("name", GOOD)
def test_flows_of_pyro_as_steps(name):
    """The laws hold, the parameters are the flow's, and a used flow can be copied."""
    transform = GOOD[name]()
    flow = Flow([transform, Affine(2)])
    check_invertible(flow)
    inner = transform.inv if name == "reverse" else transform
    if isinstance(inner, torch.nn.Module):
        mine = {id(p) for p in flow.parameters()}
        assert {id(p) for p in inner.parameters()} < mine
    flow.double()
    x = points(20, 2)
    z, log_det = flow(x)
    back, log_det_back = flow.inverse(z)
    assert torch.allclose(back, x, atol=1e-6)
    assert torch.allclose(log_det_back, -log_det, atol=1e-5)
    assert torch.allclose(copy.deepcopy(flow)(x)[0], z)
    expected = [torch.linalg.slogdet(jacobian(flow, row))[1] for row in x[:3]]
    assert torch.allclose(log_det[:3], torch.stack(expected), atol=1e-6)


def jacobian(flow, row):
    return torch.autograd.functional.jacobian(lambda r: flow(r[None])[0][0], row)


def test_baselines_are_right_forwards():
    """Not boostable, but their log-determinants are autograd's."""
    for name in ("Planar", "Radial", "Sylvester"):
        flow = Flow([WITHOUT[name](), WITHOUT[name]()], dim=2).double()
        x = points(4, 2)
        expected = [torch.linalg.slogdet(jacobian(flow, row))[1] for row in x]
        assert torch.allclose(flow(x)[1], torch.stack(expected), atol=1e-6)


def test_conditional_flows_of_pyro_as_steps():
    flow = Flow([pyro_flows.conditional_affine_coupling(3, 2)], dim=3, context=2).double()
    x, context = points(6, 3), points(6, 2, seed=4)
    check_invertible(flow)
    z, log_det = flow(x, context)
    back, _ = flow.inverse(z, context)
    assert torch.allclose(back, x)
    assert not torch.allclose(flow(x, context.flip(0))[0], z)
    expected = torch.stack(
        [
            log_det_by_autograd(lambda r, i=i: flow(r, context[i])[0], x[i : i + 1])[0]
            for i in range(6)
        ]
    )
    assert torch.allclose(log_det, expected)
    with pytest.raises(ValueError, match="Planar"):
        check_invertible(Flow([pyro_flows.conditional_planar(3, 2)], dim=3, context=2))
    with pytest.raises(ValueError, match="depends on a context; pass its width"):
        Flow([pyro_flows.conditional_affine_coupling(3, 2)], dim=3)


class OneWay(Transform):
    domain = codomain = constraints.real_vector
    bijective = True

    def _call(self, x):
        return 2 * x

    def log_abs_det_jacobian(self, x, y):
        return x.new_full(x.shape[:-1], 2 * 0.6931471805599453)


class Wrong(OneWay):
    def _inverse(self, y):
        return y / 3


class WrongVolume(OneWay):
    def _inverse(self, y):
        return y / 2

    def log_abs_det_jacobian(self, x, y):
        return x.sum(-1) - y.sum(-1) * 0.3


def test_unknown_flows_are_tried():
    with pytest.raises(ValueError, match="OneWay has no inverse"):
        check_invertible(Flow([OneWay()], dim=2))
    with pytest.raises(ValueError, match="Wrong is not undone by its inverse"):
        check_invertible(Flow([Wrong()], dim=2))
    with pytest.raises(ValueError, match="codomain of step ExpTransform"):
        Flow([ExpTransform()], dim=2)
    with pytest.raises(ValueError, match="domain of step GeneralizedChannelPermute"):
        Flow([pyro_flows.GeneralizedChannelPermute(3)], dim=3)
    check_invertible(realnvp(2))
    check_invertible(Affine(2))
    with pytest.raises(ValueError, match="step Planar"):
        check_invertible(pyro_flows.planar(2))
