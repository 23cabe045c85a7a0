"""Flows of a mixture run side by side, in blocks of rows that fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyroboost.flows import Flow
from pyroboost.flows._costs import numbers_per_row
from pyroboost.flows._stacked import Stack, alike

__all__ = ["in_blocks", "limit_of", "push_all", "score_all", "score_base", "score_each", "together"]

_MANY = 1000  # rows above which the work itself costs more than the calls that it takes
_BLOCK = 10_000  # rows of a block at most: larger ones leave the cache and are slower
_Run = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def score_all(
    base: TorchDistribution,
    flows: Sequence[Flow],
    value: Tensor,
    context: Tensor | None,
    memory: float,
) -> list[Tensor]:
    r"""Return :math:`\log g_c` of every flow at the same points.

    Args:
        base: q_0.  # (*B), event (D)
        flows: C flows; those of one shape run side by side, or, on many points, in turns.
        value: points of any origin.  # (*S, *B, D)
        context: what amortised flows depend on.  # broadcasts to (*B, width)
        memory: bound on what the flows hold at once, in MiB.

    Returns:
        One tensor of log densities in nats for each flow.  # (*S, *B)
    """
    return score_each(base, flows, value.unsqueeze(0), context, memory)


def score_each(
    base: TorchDistribution,
    flows: Sequence[Flow],
    points: Tensor,
    context: Tensor | None,
    memory: float,
) -> list[Tensor]:
    r"""Return :math:`\log g_c` of every flow at its own points (C, \*S, \*B, D), or at one set."""
    found: dict[int, Tensor] = {}
    many = math.prod(points.shape[1:-1]) > _MANY
    for group in alike(flows):
        for some in [[i] for i in group] if many else [group]:
            own = points if len(points) == 1 else points[some]
            scores = _score_group(base, [flows[i] for i in some], own, context, memory)
            found.update(zip(some, scores, strict=True))
    return [found[i] for i in range(len(flows))]


def _score_group(
    base: TorchDistribution,
    flows: Sequence[Flow],
    points: Tensor,
    context: Tensor | None,
    memory: float,
) -> tuple[Tensor, ...]:
    """Score flows of one shape, a block of samples at a time."""
    limit, each = limit_of(flows, points, memory), math.prod(base.batch_shape)
    run = together(flows, inverse=True)

    def score(part: Tensor) -> Tensor:
        wide = part.expand(len(flows), *part.shape[1:])
        z0, log_det = in_blocks(run, wide, context, limit)
        return score_base(base, z0) + log_det

    shape = points.shape[1:-1]
    if math.prod(shape) <= limit:
        return score(points).unbind()
    samples = points.reshape(len(points), -1, *base.batch_shape, points.shape[-1])
    parts = torch.split(samples, max(1, limit // max(1, each)), 1)
    scores = torch.cat([score(part) for part in parts], 1)
    return scores.reshape(len(flows), *shape).unbind()


def score_base(base: TorchDistribution, z0: Tensor) -> Tensor:
    """Return log densities of points of the base; torch cannot sum those of no points."""
    return torch.as_tensor(base.log_prob(z0)) if z0.numel() else z0.sum(-1)


def push_all(flows: Sequence[Flow], z0: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run every flow forwards on its own points (C, *S, D); log-determinants are (C, *S)."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for group in alike(flows):
        own = z0 if len(group) == len(flows) else z0[group]
        value, log_det = together([flows[i] for i in group], inverse=False)(own, context)
        if len(group) == len(flows):
            return value, log_det
        found.update(zip(group, zip(value, log_det, strict=True), strict=True))
    values, log_dets = zip(*(found[i] for i in range(len(flows))), strict=True)
    return torch.stack(values), torch.stack(log_dets)


def in_blocks(
    run: _Run, points: Tensor, context: Tensor | None, limit: int
) -> tuple[Tensor, Tensor]:
    r"""Run flows on points (C, \*S, \*B, D), at most `limit` rows at a time."""
    shape = points.shape
    if math.prod(shape[1:-1]) <= limit:
        return run(points, context)
    rows = points.reshape(shape[0], -1, shape[-1])
    blocks = torch.split(rows, limit, 1)
    contexts: Sequence[Tensor | None] = [None] * len(blocks)
    if context is not None:
        given = context.expand(*shape[1:-1], context.shape[-1]).reshape(-1, context.shape[-1])
        contexts = torch.split(given, limit)
    done = [run(block, rows) for block, rows in zip(blocks, contexts, strict=True)]
    values, log_dets = (torch.cat(parts, 1) for parts in zip(*done, strict=True))
    return values.reshape(shape), log_dets.reshape(shape[:-1])


def together(flows: Sequence[Flow], *, inverse: bool) -> _Run:
    """Return one map of the points (C, *S, D) of C flows of one shape."""
    if len(flows) > 1:
        stack = Stack(flows)
        return stack.inverse if inverse else stack.forward
    alone = flows[0].inverse if inverse else flows[0].forward

    def run(points: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        value, log_det = alone(points.squeeze(0), context)
        return value.unsqueeze(0), log_det.unsqueeze(0)

    return run


def limit_of(flows: Sequence[Flow], value: Tensor, memory: float) -> int:
    """Count the rows that flows of one shape may take at once."""
    taken = len(flows) * numbers_per_row(flows[0]) * value.element_size()
    return max(1, min(_BLOCK, int(memory * 2**20 / taken)))
