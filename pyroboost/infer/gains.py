"""The term of one stage in the bound, with its error, and what it means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyroboost.compose import Cascade
from pyroboost.contexts import forked_rng
from pyroboost.evaluation.weights import bound_draw, row_blocks, take_rows
from pyroboost.infer.weighting import check_weights

__all__ = ["Gain", "Verdict", "stage_gain"]

Verdict = Literal["base", "grows", "nothing gained", "not well trained: retrain", "undecided"]


@dataclass(frozen=True)
class Gain:
    """A term L_k of the bound: its mean over data and its standard error, in nats."""

    value: float
    std_error: float

    def verdict(self) -> Verdict:
        """Say what the term means, at two standard errors; without one nothing can be said."""
        if not (math.isfinite(self.value) and math.isfinite(self.std_error)):
            return "undecided"
        if self.value > 2 * self.std_error:
            return "grows"
        return (
            "nothing gained" if self.value >= -2 * self.std_error else "not well trained: retrain"
        )

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.std_error:.3f}"


def stage_gain(
    cascade: Cascade,
    index: int,
    x: Tensor,
    *args: Any,
    weights: Tensor | None = None,
    seed: int | None = None,
) -> Gain:
    r"""Measure the term of one stage: $L_k$, or the bound itself for the bottom stage.

    A stage with ``num_particles`` K > 1, such as an IWAE, enters with its importance-weighted
    bound and the law of h that belongs to it; see :func:`bound_draw`.

    Args:
        cascade: the cascade.
        index: the stage, from 0.
        x: data.  # (N, ...)
        *args: further arguments of the cascade.
        weights: a weight for each datum; the term is then the weighted mean.  # (N,)
        seed: seed of this measurement's own random stream.

    Returns:
        The term with its standard error, which holds the errors of both log Z estimates in it.

    Reference:
        Cascaded meta-models, Eq. 7.
    """
    _check(cascade, index, x, weights)
    stage, values = cascade[index], []
    copies = max(part.num_particles for part in cascade[: index + 1])
    with forked_rng(seed):
        for rows, _ in row_blocks(cascade[: index + 1], x, args, 1, 256.0 / copies):
            block, *own = take_rows((x, *args), rows, len(x))
            values.append(_gain(cascade, index, block, own))
    per_datum = torch.cat(values).double()
    value, error = _mean(per_datum, weights)
    shared = [stage.normalisation()[1]]
    if index:
        shared.append(cascade[index - 1].normalisation()[1])
    # Two equal densities differ by rounding, which must not pass for a gain.
    rounding = 1e-6 * max(1.0, float(per_datum.abs().max()))
    return Gain(value, math.hypot(error, rounding, *shared))


def _check(cascade: Cascade, index: int, x: Tensor, weights: Tensor | None) -> None:
    if not 0 <= index < len(cascade):
        raise ValueError(
            f"stage_gain: there is no stage {index} in a cascade of {len(cascade)}; count from 0."
        )
    if len(x) < 2:
        raise ValueError(f"stage_gain: {len(x)} data have no standard error; pass two or more.")
    if weights is not None:
        check_weights(weights, len(x), "weights")


def _mean(values: Tensor, weights: Tensor | None) -> tuple[float, float]:
    """Return the weighted mean and its standard error."""
    if weights is None:
        return float(values.mean()), float(values.std()) / math.sqrt(len(values))
    share = weights.to(values) / weights.to(values).sum()
    mean = float(share @ values)
    return mean, float((share * (values - mean)).square().sum().sqrt())


def _gain(cascade: Cascade, index: int, x: Tensor, args: list[Any]) -> Tensor:
    own = cascade.stage_args(args)
    log_prior: Tensor | float = 0.0
    if index:
        *_, x = [x, *cascade.climb(x, *args, stages=index - 1)]
        below = bound_draw(cascade[index - 1], x, *own[index - 1])
        x, log_prior = below.hidden, below.log_prior
    return bound_draw(cascade[index], x, *own[index]).log_weight - log_prior
