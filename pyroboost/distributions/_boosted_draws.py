"""Draws from a mixture of flows, each row by the component that was drawn for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyroboost.distributions._boosted_scores import (
    in_blocks,
    limit_of,
    push_all,
    score_base,
    together,
)
from pyroboost.flows import Flow
from pyroboost.flows._stacked import alike

__all__ = ["Draw", "draw", "rows_of", "score_draw"]

_FEW = 512  # rows up to which all flows side by side cost less than each on its own rows


class Draw(NamedTuple):
    """Points of a mixture, and where they came from."""

    value: Tensor  # (*S, *B, D)
    source: Tensor  # of the base, (*S, *B, D)
    log_det: Tensor  # log |det dz/dz_0|, (*S, *B)
    drawn: Tensor  # the component of each, (*S, *B)


def draw(
    z0: Tensor, drawn: Tensor, flows: Mapping[int, Flow], context: Tensor | None, memory: float
) -> Draw:
    """Move every point of the base by the flow that was drawn for it.

    Args:
        z0: points of the base.  # (*S, *B, D)
        drawn: the number of a flow for each.  # (*S, *B)
        flows: the flows by their numbers.
        context: what amortised flows depend on.  # broadcasts to (*B, width)
        memory: bound on what the flows hold at once, in MiB.
    """
    if len(flows) > 1 and _few(flows, z0, memory):
        points = z0.expand(len(flows), *z0.shape)
        values, log_dets = push_all([*flows.values()], points, context)
        place = drawn.new_zeros(max(flows) + 1)
        place[[*flows]] = torch.arange(len(flows), device=drawn.device)
        own = place[drawn].unsqueeze(0)
        value = values.gather(0, own.unsqueeze(-1).expand(1, *z0.shape)).squeeze(0)
        return Draw(value, z0, log_dets.gather(0, own).squeeze(0), drawn)
    value, log_det = z0.clone(), z0.new_zeros(drawn.shape)
    for c, flow in flows.items():
        rows = drawn == c
        value[rows], log_det[rows] = _on_rows(flow, z0, rows, context, memory, inverse=False)
    return Draw(value, z0, log_det, drawn)


def score_draw(
    base: TorchDistribution,
    made: Draw,
    flows: Mapping[int, Flow],
    context: Tensor | None,
    memory: float,
) -> list[Tensor]:
    """Return the log densities of every flow at points just drawn, (*S, *B) each.

    The density of the flow that drew a point comes from the draw. If there are few points, all
    flows are inverted at all points side by side; if many, each at those of the others alone.
    """
    if len(flows) > 1 and _few(flows, made.value, memory):
        return _score_few(base, made, flows, context)
    scores = []
    for c, flow in flows.items():
        others, source, log_det = made.drawn != c, made.source, -made.log_det
        if bool(others.any()):
            source = source.clone()
            found = _on_rows(flow, made.value, others, context, memory, inverse=True)
            source[others], log_det[others] = found
        scores.append(score_base(base, source) + log_det)
    return scores


def _score_few(
    base: TorchDistribution, made: Draw, flows: Mapping[int, Flow], context: Tensor | None
) -> list[Tensor]:
    """Invert all flows at all points, side by side, and put each draw's own source in its place.

    Rounding may have made the inverse of a flow's own draw infinite, which the base would refuse.
    """
    listed, numbers = [*flows.values()], torch.tensor([*flows], device=made.drawn.device)
    found: dict[int, Tensor] = {}
    for group in alike(listed):
        points = made.value.expand(len(group), *made.value.shape)
        z0, log_det = together([listed[i] for i in group], inverse=True)(points, context)
        own = made.drawn == numbers[group].view(-1, *[1] * made.drawn.dim())
        z0 = torch.where(own.unsqueeze(-1), made.source, z0)
        scores = score_base(base, z0) + torch.where(own, -made.log_det, log_det)
        found.update(zip(group, scores.unbind(), strict=True))
    return [found[i] for i in range(len(listed))]


def rows_of(context: Tensor | None, rows: Tensor) -> Tensor | None:
    """Return the contexts of some of the draws, which a mask (*S, *B) picks."""
    if context is None:
        return None
    return context.expand(*rows.shape, context.shape[-1])[rows]


def _few(flows: Mapping[int, Flow], points: Tensor, memory: float) -> bool:
    count = math.prod(points.shape[:-1])
    return count <= min(_FEW, limit_of([*flows.values()], points, memory))


def _on_rows(
    flow: Flow,
    points: Tensor,
    rows: Tensor,
    context: Tensor | None,
    memory: float,
    *,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Run one flow on the rows that a mask picks."""
    run = together([flow], inverse=inverse)
    given, limit = rows_of(context, rows), limit_of([flow], points, memory)
    value, log_det = in_blocks(run, points[rows].unsqueeze(0), given, limit)
    return value.squeeze(0), log_det.squeeze(0)
