"""Flows that run side by side give what each gives by itself, and gradients go where they did."""

import copy

import pyro.distributions.transforms as transforms
import pytest
import torch
from flow_cases import BUILD, make, points
from torch import nn

from pyroboost import flows
from pyroboost.flows import Affine, AffineCoupling, Flow, SplineCoupling
from pyroboost.flows._costs import numbers_per_row
from pyroboost.flows._stacked import Stack, alike

COUNT = 4


def several(name, dim=3, depth=2, context=0, count=COUNT):
    """Flows of one shape with different numbers; permutations are alike by construction."""
    return [make(name, dim, depth, context=context, seed=seed) for seed in range(count)]


def one_by_one(listed, way, x, context):
    done = [getattr(flow, way)(part, context) for flow, part in zip(listed, x, strict=True)]
    return [torch.stack(parts) for parts in zip(*done, strict=True)]


@pytest.mark.parametrize("context", [0, 5])
@pytest.mark.parametrize("name", BUILD)
def test_side_by_side_is_one_by_one(name, context):
    """For shared and own points, samples of rows, one row of context for all, and no points."""
    listed = several(name, context=context)
    assert alike(listed) == [[0, 1, 2, 3]]
    stack = Stack(listed)
    given = points(6, 5, seed=3) if context else None
    cases = [
        (points(18, 3).reshape(3, 6, 3).expand(COUNT, 3, 6, 3), given),
        (points(24, 3).reshape(COUNT, 6, 3), given),
        (points(24, 3).reshape(COUNT, 6, 3), None if given is None else given[0]),
        (points(36 * 2, 3).reshape(COUNT, 3, 6, 3), None if given is None else given[:1]),
        (points(COUNT, 3), None if given is None else given[0]),
        (points(0, 3).reshape(COUNT, 0, 6, 3), given),
    ]
    for x, rows in cases:
        for way in ("forward", "inverse"):
            found = getattr(stack, way)(x, rows)
            for mine, theirs in zip(found, one_by_one(listed, way, x, rows), strict=True):
                assert mine.shape == theirs.shape
                assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context", [0, 5])
@pytest.mark.parametrize("name", [name for name in BUILD if name != "permutation"])
def test_gradients_are_those_of_one_by_one(name, context):
    """To points, to contexts, and to every parameter of every flow, each its own."""
    listed = several(name, context=context)
    x = points(6, 3).requires_grad_()
    given = points(6, 5, seed=3).requires_grad_() if context else None
    wanted = [x, *([] if given is None else [given])]
    wanted += [p for flow in listed for p in flow.parameters()]
    each = torch.linspace(0.5, 2.0, COUNT, dtype=x.dtype)

    def gradients(run, way):
        z, log_det = run(way)
        loss = (each[:, None] * (z.tanh().sum(-1) + log_det)).sum()
        return torch.autograd.grad(loss, wanted, allow_unused=True)

    shared = x.expand(COUNT, *x.shape)
    for way in ("forward", "inverse"):
        mine = gradients(lambda way: getattr(Stack(listed), way)(shared, given), way)
        theirs = gradients(lambda way: one_by_one(listed, way, shared, given), way)
        for a, b in zip(mine, theirs, strict=True):
            assert torch.allclose(a, torch.zeros_like(a) if b is None else b, atol=1e-9)
        assert all(bool((gradient != 0).any()) for gradient in mine)


def test_parameters_are_never_out_of_date():
    """Steps of an optimiser, writes through `.data`, states, conversions and copies are seen."""
    listed = several("realnvp", dim=2)
    module, x = nn.ModuleList(listed), points(9, 2)

    def check(now, like):
        found = Stack(list(now)).inverse(like.expand(COUNT, *like.shape))
        for mine, theirs in zip(found, one_by_one(now, "inverse", [like] * COUNT, None)):  # noqa: B905
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)
        return found[0].detach()

    seen, state = [check(module, x)], copy.deepcopy(module.state_dict())
    optimiser = torch.optim.Adam(module.parameters(), 0.1)
    Stack(listed).inverse(x.expand(COUNT, 9, 2))[0].square().sum().backward()
    optimiser.step()
    seen.append(check(module, x))
    for parameter in module.parameters():
        parameter.data.mul_(1.5)
    seen.append(check(module, x))
    twin = copy.deepcopy(module)
    module.load_state_dict(state)
    assert torch.equal(check(module, x), seen[0])
    assert torch.equal(check(twin, x), seen[2])
    assert float((seen[0] - seen[1]).abs().max()) > 1e-3
    assert float((seen[1] - seen[2]).abs().max()) > 1e-3
    assert check(module.float(), x.float()).dtype == torch.float32


def test_only_flows_of_one_shape_are_alike():
    realnvp = flows.realnvp
    listed = [
        realnvp(3, 1),
        flows.nlsq(3, 1),
        realnvp(3, 1),
        realnvp(3, 2),
        realnvp(3, 1, units=8),
        realnvp(3, 1, limit=2.0),
        realnvp(3, 1, context=2),
        realnvp(3, 1).double(),
        realnvp(3, 1, units=[64, 64]),
        flows.nlsq(3, 1),
        flows.nice(3, 1),
    ]
    assert alike(listed) == [[0, 2], [1, 9], [3], [4], [5], [6], [7], [8], [10]]
    settings = [
        Flow([AffineCoupling(4, kept=[0, 1])]),
        Flow([AffineCoupling(4, kept=[1, 0])]),
        Flow([SplineCoupling(4, bins=4)]),
        Flow([SplineCoupling(4, bins=4, bound=5.0)]),
        Flow([flows.Permutation([0, 1, 3, 2])]),
        Flow([flows.Permutation([1, 0, 2, 3])]),
        Flow([flows.Householder(4, pairs=2)]),
        Flow([flows.Householder(4, pairs=1)]),
    ]
    assert alike(settings) == [[i] for i in range(len(settings))]


def test_what_is_not_known_runs_by_itself():
    class Mine(Affine):
        """A step of the user's own, which may do anything."""

    watched = flows.realnvp(2, 1)
    watched.steps[0].net.outer.register_forward_hook(lambda *_: None)
    masked = flows.realnvp(2, 1)
    masked.steps[0].net.inner[0] = type("Other", (nn.Linear,), {})(1, 64)
    affine = flows.affine(2)
    affine.steps[0].coefficients.register_forward_hook(lambda *_: None)
    listed = [
        *(Flow([Mine(2)]) for _ in range(2)),
        *(Flow([transforms.affine_coupling(2, hidden_dims=[4])], dim=2) for _ in range(2)),
        *(watched, flows.realnvp(2, 1), masked, affine, flows.affine(2)),
    ]
    assert alike(listed) == [[i] for i in range(len(listed))]
    assert alike([Flow([], dim=2), Flow([], dim=2)]) == [[0, 1]]
    x = points(6, 2).reshape(2, 3, 2)
    z, log_det = Stack([Flow([], dim=2), Flow([], dim=2)]).forward(x)
    assert torch.equal(z, x)
    assert torch.equal(log_det, torch.zeros(2, 3, dtype=x.dtype))


def test_what_a_row_takes_grows_with_the_flow():
    wide, narrow = flows.realnvp(2, units=512), flows.realnvp(2, units=16)
    assert numbers_per_row(wide) > 512 > numbers_per_row(narrow)
    assert numbers_per_row(flows.lu(20, context=3)) > 400 > numbers_per_row(flows.lu(20))
    assert numbers_per_row(flows.spline(2, bins=40)) > numbers_per_row(flows.spline(2, bins=4))
    borrowed = Flow([transforms.affine_autoregressive(2, hidden_dims=[300])], dim=2)
    assert numbers_per_row(borrowed) > 300
    assert numbers_per_row(Flow([], dim=2)) > 2
