"""What a mixture of flows is made of, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyroboost.flows import Flow, check_invertible

__all__ = ["check_components", "check_context", "check_points", "check_weights"]


def check_components(base: TorchDistribution, components: Sequence[Flow], allow_slow: bool) -> None:
    """Refuse a base that is not of vectors, and components that do not fit or do not invert."""
    if len(base.event_shape) != 1:
        raise ValueError(
            f"BoostedFlow: the base has event shape {tuple(base.event_shape)}; give a "
            "distribution of vectors, for example by to_event(1)."
        )
    if not components:
        raise ValueError("BoostedFlow: there are no components; give one flow or more.")
    for c, flow in enumerate(components):
        if not isinstance(flow, Flow):
            raise TypeError(
                f"BoostedFlow: component {c} is {type(flow).__name__}; give a "
                "pyroboost.flows.Flow, or put transforms into one: Flow([transform])."
            )
        if flow.dim != base.event_shape[0]:
            raise ValueError(
                f"BoostedFlow: component {c} ('{flow.name}') is of dimension {flow.dim}, the base "
                f"of {base.event_shape[0]}; make them equal."
            )
        check_invertible(flow, allow_slow=allow_slow, where=f"BoostedFlow: component {c}")


def check_weights(
    weights: Tensor | None, logits: Tensor | None, components: Sequence[Flow]
) -> Tensor:
    """Return the weights or the logits, or equal weights for neither, (C)."""
    count = len(components)
    if weights is not None and logits is not None:
        raise ValueError("BoostedFlow: both weights and logits came; give one of them.")
    given = weights if logits is None else logits
    if given is None:
        like = next((p for flow in components for p in flow.parameters()), torch.ones(()))
        return like.detach().new_full((count,), 1 / count)
    name = "weights" if logits is None else "logits"
    if given.shape != (count,):
        raise ValueError(
            f"BoostedFlow: {name} have shape {tuple(given.shape)}; give one number for each of "
            f"the {count} components."
        )
    if logits is not None and not bool((given < math.inf).all() and given.isfinite().any()):
        raise ValueError(
            f"BoostedFlow: logits are {given.tolist()}; give numbers below infinity, one of them "
            "finite."
        )
    total = float(given.detach().sum())
    if logits is None and not (bool((given >= 0).all()) and abs(total - 1) < 1e-4):
        raise ValueError(
            f"BoostedFlow: weights are {given.tolist()}; give numbers from zero up whose sum is "
            "one."
        )
    return given


def check_context(
    base: TorchDistribution, components: Sequence[Flow], context: Tensor | None
) -> torch.Size:
    """Return the batch shape that base and context make together."""
    for c, flow in enumerate(components):
        if flow.context and (context is None or context.shape[-1:] != (flow.context,)):
            came = "none" if context is None else f"of shape {tuple(context.shape)}"
            raise ValueError(
                f"BoostedFlow: component {c} ('{flow.name}') needs a context of width "
                f"{flow.context}, and {came} came; pass context= of shape (..., {flow.context})."
            )
    if context is None:
        return base.batch_shape
    try:
        return torch.Size(np.broadcast_shapes(base.batch_shape, context.shape[:-1]))
    except ValueError:
        raise ValueError(
            f"BoostedFlow: a context of shape {tuple(context.shape)} does not fit a base of "
            f"batch shape {tuple(base.batch_shape)}; give one row for each."
        ) from None


def check_points(
    where: str, value: Tensor, expected: tuple[int, ...], finite: bool
) -> tuple[int, ...]:
    """Return the shape of points broadcast with what is expected of one draw."""
    try:
        fits = value.shape[-1:] == expected[-1:]
        shape = np.broadcast_shapes(value.shape, expected)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{where}: points have shape {tuple(value.shape)}; give some that broadcast with "
            f"{expected}, samples on the left and coordinates last."
        )
    if finite and not bool(value.isfinite().all()):
        raise ValueError(f"{where}: points are not all finite numbers.")
    return shape
