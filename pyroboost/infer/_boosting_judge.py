"""The decision after a round: which weights, and whether what was trained is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyroboost.infer._boosting_settings import BoostSettings
from pyroboost.infer._mixture_table import Measured, Table, gain
from pyroboost.infer._mixture_weights import WeightStep, descend, on_line, on_simplex

__all__ = ["Decision", "base", "choose_weights", "failure", "judge"]

Draws = Callable[..., Table]


class Decision(NamedTuple):
    """What becomes of a training; see :class:`BoostedRound` for the fields."""

    keep: bool  # whether networks and flows stay as trained
    accepted: bool
    verdict: str
    bound: Measured
    gain: Measured | None
    own: Measured | None
    weights: tuple[float, ...]
    proposed: tuple[float, ...]
    steps: tuple[WeightStep, ...]
    pareto_k: float | None


def base(before: Table | None, after: Table, weights: Tensor) -> Decision:
    """Accept the first component: as it has trained, unless its start was better than that.

    Args:
        before: draws from the start; ``None`` if it had no finite bound.
        after: draws from the same noise now.
        weights: the weights, one of which is 1.  # (C)
    """
    one, full = weights[list(after.components)], tuple(weights.tolist())
    gained, keep = None, True
    if before is not None:
        gained = gain(after, one, before, one)
        keep = not _worse(gained, before.bound(one))
    table = after if keep or before is None else before
    words = "base" if keep else "base: worse than its start, which is put back"
    return Decision(
        keep, True, words, table.bound(one), gained, None, full, full, (), table.pareto_k(one)
    )


def _worse(gained: Measured, was: Measured) -> bool:
    """Tell whether a bound has fallen by more than its error."""
    # What has gone wild has an error that would excuse anything: that of before counts too.
    allowed = min(gained.error, was.error)
    return not (math.isfinite(gained.error) and gained.value >= -allowed)


def failure(before: Table | None, old: Tensor, words: str) -> Decision:
    """Keep the mixture as it was before a training that broke down."""
    bound, k, full = Measured(math.nan, math.nan), None, tuple(old.tolist())
    if before is not None:
        was = old[list(before.components)]
        bound, k = before.bound(was), before.pareto_k(was)
    return Decision(False, False, words, bound, None, None, full, full, (), k)


def choose_weights(
    options: BoostSettings, draws: Draws, active: list[int], old: Tensor, c: int | None
) -> tuple[Tensor, list[WeightStep]]:
    """Choose the weights of the active components, in their order.

    Args:
        options: how.
        draws: a table of fresh draws of some components, by a purpose.
        active: the components.
        old: weights of before.  # (C)
        c: the component that has trained; ``None`` for all.
    """
    place, start = 0 if c is None else active.index(c), old[active]
    by = options.weights
    if by == "equal":
        return torch.full((len(active),), 1 / len(active)), []
    if by == "simplex" or c is None:
        return on_simplex(draws(active, "weigh"), start, place)
    fixed = start.clone()
    fixed[place] = 0.0
    fixed = fixed / fixed.sum()
    if by == "line":
        return on_line(draws(active, "weigh"), fixed, place)
    descent = options.descent
    step = lambda t: draws(active, "descend", t, draws=descent.num_samples)  # noqa: E731
    return descend(step, fixed, place, descent)


def judge(
    kind: str,
    c: int | None,
    before: Table,
    old: Tensor,
    after: Table,
    found: tuple[Tensor, Sequence[WeightStep]],
    options: BoostSettings,
) -> Decision:
    """Compare the mixture with new weights to that of before, on draws that chose nothing.

    Args:
        kind: ``"round"``, ``"fine-tune"`` or ``"joint"``.
        c: the component that has trained; ``None`` for all.
        before: draws from the mixture of before.
        old: its weights.  # (C)
        after: draws from the same noise now.
        found: weights of the components of ``after``, and how they were found.
        options: the threshold.
    """
    new, steps = found[0].to(after.joint), tuple(found[1])
    was = old[list(before.components)].to(after.joint)

    def full(weights: Tensor) -> tuple[float, ...]:
        spread = torch.zeros(len(old), dtype=weights.dtype)
        spread[list(after.components)] = weights.cpu()
        return tuple(spread.tolist())

    def decide(keep: bool, accepted: bool, words: str, final: Tensor) -> Decision:
        table = after if keep else before
        weights = full(final) if keep else tuple(old.tolist())
        gained = gain(after, final if keep else new, before, was)
        bound, k = table.bound(final), table.pareto_k(final)
        return Decision(keep, accepted, words, bound, gained, own, weights, full(new), steps, k)

    gained, own = gain(after, new, before, was), None
    if kind != "round":
        kept = not _worse(gained, before.bound(was))
        return decide(kept, kept, "kept" if kept else "worse: put back", new if kept else was)
    assert c is not None
    place = after.components.index(c)
    without = new.clone()
    without[place] = 0.0
    without = without / without.sum() if float(without.sum()) > 0 else old[list(after.components)]
    without = without.to(after.joint)
    own = gain(after, new, after, without)
    if float(new[place]) > 0 and _above(own, options) and _above(gained, options):
        return decide(True, True, "grows", new)
    if _above(gain(after, without, before, was), options):
        return decide(True, False, "dropped: the networks alone gained", without)
    return decide(False, False, "nothing gained: put back", was)


def _above(gained: Measured, options: BoostSettings) -> bool:
    """Tell whether a gain exceeds its error by the factor asked for."""
    return gained.value > options.threshold * gained.error and gained.value > 0


def report_fields(decision: Decision) -> dict[str, Any]:
    """Return what a report says of a decision."""
    fields = decision._asdict()
    del fields["keep"]
    return fields
