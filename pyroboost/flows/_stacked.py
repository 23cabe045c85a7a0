"""Flows of one shape, run side by side: every step once for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyroboost.flows.couplings import (
    AdditiveCoupling,
    AffineCoupling,
    Conditioner,
    Coupling,
    SplineCoupling,
    dense,
)
from pyroboost.flows.elementwise import Affine, NonlinearSquared, Spline
from pyroboost.flows.flow import Flow
from pyroboost.flows.linear import LU, Householder, LowerTriangular, Permutation
from pyroboost.flows.step import Coefficients, CoefficientStep, Step

__all__ = ["Stack", "alike"]

# What two steps of a kind must have in common to be run by one of them. Subclasses are not
# listed: what they changed is not known.
_SETTINGS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    Affine: lambda step: (),
    NonlinearSquared: lambda step: (),
    Spline: lambda step: (step.bins, step.bound),
    LowerTriangular: lambda step: (),
    LU: lambda step: (),
    Householder: lambda step: (step.pairs,),
    Permutation: lambda step: tuple(step.order.tolist()),
    AdditiveCoupling: lambda step: step.split,
    AffineCoupling: lambda step: (step.split, step.limit),
    SplineCoupling: lambda step: (step.split, step.bins, step.bound),
}


def alike(flows: Sequence[Flow]) -> list[list[int]]:
    """Group flows, given by their places, into those that `Stack` can run side by side.

    Flows with steps of other makers, and modules that hooks watch, are each alone.
    """
    groups: dict[Any, list[int]] = {}
    for i, flow in enumerate(flows):
        groups.setdefault(_shape(flow) or i, []).append(i)
    return list(groups.values())


class Stack:
    r"""C flows of one shape as one map of points (C, \*S, D), the c-th by flow c.

    Parameters are stacked anew each time, so that none is out of date, and gradients reach
    those of every flow.

    Args:
        flows: the flows of one group of `alike`.
    """

    def __init__(self, flows: Sequence[Flow]) -> None:
        self.count, self.context = len(flows), flows[0].context
        columns = zip(*(flow.steps for flow in flows), strict=True)
        self.steps: list[tuple[Step, Any]] = [(steps[0], _source(steps)) for steps in columns]

    def forward(self, z0: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Run every flow forwards on its own points, as `Flow.forward` does.

        Args:
            z0: points of the base.  # (C, *S, D)
            context: contexts that broadcast with \*S.  # (*B, width)

        Returns:
            z, and log-determinants in nats.  # (C, *S, D), (C, *S)
        """
        return self._run(z0, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run every flow backwards on its own points, as `Flow.inverse` does."""
        return self._run(z, context, inverse=True)

    def _run(self, z: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        x, context = self._lay(z, context)
        log_det: Tensor | None = None
        for step, source in reversed(self.steps) if inverse else self.steps:
            x, term = _move(step, source, x, context, inverse)
            log_det = term if log_det is None else log_det + term
        log_det = x.new_zeros(x.shape[:-1]) if log_det is None else log_det
        return x.reshape(z.shape), log_det.reshape(z.shape[:-1])

    def _lay(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Lay points out as (C, N, D); with R rows of context as (C, S, R, D)."""
        dim, total = z.shape[-1], math.prod(z.shape[1:-1])
        flat = z.reshape(self.count, total, dim)
        if not self.context or context is None:
            return flat, None
        batch = z.shape[1:-1][z.dim() - 1 - context.dim() :]
        count, width = math.prod(batch), context.shape[-1]
        rows = context.expand(*batch, width).reshape(count, width)
        if count <= 1 or not total:
            return flat, rows[:1].expand(self.count, min(count, 1), width)
        laid = flat.reshape(self.count, total // count, count, dim)
        return laid, rows.expand(self.count, 1, count, width)


class _Linears:
    """One `nn.Linear` of each flow: rows (C, *S, in) to (C, *S, out)."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> None:
        self.weight = torch.stack(tuple(weights)).mT
        self.bias = None if biases is None else torch.stack(tuple(biases)).unsqueeze(1)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x if x.dim() == 3 else x.reshape(len(x), -1, x.shape[-1])
        if self.bias is None:
            out = torch.bmm(rows, self.weight)
        else:
            out = torch.baddbmm(self.bias, rows, self.weight)
        return out if x.dim() == 3 else out.reshape(*x.shape[:-1], -1)


class _Networks:
    """One `Conditioner` of each flow."""

    def __init__(self, nets: Sequence[Conditioner]) -> None:
        self.inner = [_linears(layers) for layers in zip(*(n.inner for n in nets), strict=True)]
        self.outer = _linears([net.outer for net in nets])
        known = nets[0].context is not None
        self.context = _linears([net.context for net in nets]) if known else None

    def __call__(self, x: Tensor, context: Tensor | None) -> Tensor:
        return dense(x, context, self)


class _Coefficients:
    """One `Coefficients` of each flow."""

    def __init__(self, each: Sequence[Coefficients]) -> None:
        biases = [one.bias for one in each]
        self.free = torch.stack(tuple(biases)) if each[0].weight is None else None
        if self.free is None:
            self.affine = _Linears([one.weight for one in each], biases)  # type: ignore[misc]

    def __call__(self, x: Tensor, context: Tensor | None) -> Tensor:
        if self.free is None:
            return self.affine(context)  # type: ignore[arg-type]
        return self.free.reshape(len(x), *[1] * (x.dim() - 2), -1)


def _linears(layers: Sequence[Any]) -> _Linears:
    biases = None if layers[0].bias is None else [layer.bias for layer in layers]
    return _Linears([layer.weight for layer in layers], biases)


def _source(steps: Sequence[Step]) -> _Networks | _Coefficients | None:
    """Return what gives the numbers of steps of one kind."""
    if isinstance(steps[0], Coupling):
        return _Networks([step.net for step in steps])
    if isinstance(steps[0], CoefficientStep):
        return _Coefficients([step.coefficients for step in steps])
    return None


def _move(
    step: Step, source: Any, x: Tensor, context: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Run one step of every flow by the code of the first one's."""
    if isinstance(step, Coupling):
        return step._map(x, partial(source, context=context), inverse)
    if isinstance(step, CoefficientStep):
        return step._map(x, source(x, context), inverse)
    return step._pull(x, None) if inverse else step._push(x, None)


def _shape(flow: Flow) -> tuple[Any, ...] | None:
    """Return what a flow must share with others, or None if it is to be run by itself."""
    if type(flow) is not Flow:
        return None
    found: list[Any] = [flow.dim, flow.context]
    for step in flow.steps:
        settings = _SETTINGS.get(type(step))
        parts = None if settings is None else _parameters(step)
        if settings is None or parts is None:
            return None
        found.append((type(step), settings(step)))
        found += [(part.shape, part.dtype, part.device) for part in parts]
    return tuple(found)


def _parameters(step: Step) -> list[Tensor] | None:
    """Return the parameters of a step, or None if its modules are not as they were built."""
    if isinstance(step, CoefficientStep):
        source = step.coefficients
        if type(source) is not Coefficients or _watched(source):
            return None
        return [source.bias] if source.weight is None else [source.bias, source.weight]
    if not isinstance(step, Coupling):
        return []
    net = step.net
    layers = [*net.inner, net.outer, *([] if net.context is None else [net.context])]
    if type(net) is not Conditioner or _watched(net):
        return None
    if any(type(layer) is not nn.Linear or _watched(layer) for layer in layers):
        return None
    return [part for layer in layers for part in (layer.weight, layer.bias) if part is not None]


def _watched(module: nn.Module) -> bool:
    """Whether hooks wait for a call of the module, which a stack never makes."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
