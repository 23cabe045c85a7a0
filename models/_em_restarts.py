"""EM for Gaussian mixtures from several starts, of which the best is kept."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyroboost.models._em import Covariance, Mixture, mean_log_density
from pyroboost.models._em_fit import fit, kmeans_start, prior_start

__all__ = ["EMResult", "HeldOut", "Start", "best_of"]

Start = Literal["prior", "kmeans", "current"]


class HeldOut(NamedTuple):
    """Mean held-out log-likelihoods, in nats per datum."""

    fit: float
    start: float
    prior: float  # of one standard normal N(0, I)


@dataclass(frozen=True)
class EMResult:
    """What a fit by EM did; likelihoods are means per datum, in nats.

    Args:
        history: training log-likelihood before each step and after the last, of the best restart.
        converged: whether the last step gained less than the tolerance.
        restarts: final training log-likelihood of each restart.
        kept_start: whether the start was kept, because held-out data preferred it.
        held_out: what held-out data say; None without them.
        reseeded: how often an empty component was placed anew.
        seconds: wall-clock time.
    """

    history: list[float]
    converged: bool
    restarts: list[float]
    kept_start: bool
    held_out: HeldOut | None
    reseeded: int
    seconds: float


def best_of(
    data: Tensor,
    validation: Tensor | None,
    present: Mixture,
    covariance: Covariance,
    *,
    start: Start,
    start_weight: float,
    restarts: int,
    max_iterations: int,
    tolerance: float,
    **options: Any,
) -> tuple[Mixture, EMResult]:
    """Return the best of several runs, or its start where held-out data prefer it.

    Args:
        data: training data.  # (N, D)
        validation: held-out data.  # (M, D)
        present: the present state, of K components.
        covariance: the kind of covariance.
        start: where runs start.
        start_weight: weight of what is not the prior.
        restarts: number of runs.
        max_iterations: steps at most of each.
        tolerance: least gain of a step in nats per datum.
        **options: ``variance_floor`` and ``generator``.
    """
    begin = time.perf_counter()
    fits = []
    for _ in range(restarts):
        first = _start(data, present, covariance, start, start_weight, **options)
        found = fit(data, first, max_iterations=max_iterations, tolerance=tolerance, **options)
        fits.append((first, found))
    first, best = max(fits, key=lambda pair: pair[1].history[-1])
    held_out, kept = None, False
    if validation is not None:
        normal = prior_start(_empty_like(first), 0.0)
        scores = [mean_log_density(validation, m) for m in (best.mixture, first, normal)]
        held_out = HeldOut(*scores)
        kept = held_out.fit < held_out.start
    result = EMResult(
        history=best.history,
        converged=best.converged,
        restarts=[found.history[-1] for _, found in fits],
        kept_start=kept,
        held_out=held_out,
        reseeded=best.reseeded,
        seconds=time.perf_counter() - begin,
    )
    return first if kept else best.mixture, result


def _start(
    data: Tensor,
    present: Mixture,
    covariance: Covariance,
    start: Start,
    weight: float,
    **options: Any,
) -> Mixture:
    """One start of EM, in float64."""
    if start == "current":
        return present.to(data.new_zeros((), dtype=torch.float64))
    k = len(present.locs)
    if start == "kmeans":
        return kmeans_start(data, k, covariance=covariance, **options)
    around = kmeans_start(data, max(1, k - 1), covariance=covariance, **options)
    return prior_start(around, weight) if k > 1 else prior_start(_empty_like(around), 0.0)


def _empty_like(mixture: Mixture) -> Mixture:
    """Return a mixture of no components."""
    return Mixture(*(part[:0] for part in mixture))
