"""EM for mixtures of independent bits, under a Beta prior on each probability."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyroboost.sampling.gibbs import is_binary

__all__ = ["ROWS", "BitsEMResult", "check_fit", "run_em"]

ROWS = 8192
"""Data at once."""


@dataclass(frozen=True)
class BitsEMResult:
    """What a fit by EM did; numbers are means per datum, in nats.

    Args:
        history: training log-likelihood plus log prior before each step and after the last, of
            the best restart: it never falls.
        converged: whether the last step gained less than the tolerance.
        restarts: final value of each restart.
        held_out: mean held-out log-likelihood; ``None`` without held-out data.
        seconds: wall-clock time.
    """

    history: list[float]
    converged: bool
    restarts: list[float]
    held_out: float | None
    seconds: float


def check_fit(
    data: Tensor,
    check: Callable[[Tensor], None],
    weights: Tensor | None,
    pseudo_count: float,
    restarts: int,
    max_iterations: int,
    tolerance: float,
) -> Tensor:
    """Refuse what EM cannot be run on or with, and return weights of mean 1."""
    if not isinstance(data, Tensor):
        raise TypeError(
            f"BernoulliMixture.fit_em: got {type(data).__name__}; EM needs all data at once, "
            "as one tensor (N, D)."
        )
    check(data)
    if not is_binary(data):
        raise ValueError(
            "BernoulliMixture.fit_em: the data hold values other than 0 and 1 (or NaN); "
            "binarise them first."
        )
    if not 0.0 < pseudo_count < math.inf or restarts < 1 or max_iterations < 0:
        raise ValueError(
            f"BernoulliMixture.fit_em: got pseudo_count={pseudo_count}, restarts={restarts} "
            f"and max_iterations={max_iterations}; take a positive count, at least one "
            "restart and no negative number of steps."
        )
    if not tolerance >= 0.0:
        raise ValueError(f"BernoulliMixture.fit_em: tolerance is {tolerance}; take 0 or more.")
    if weights is None:
        return torch.ones(len(data), dtype=torch.float64, device=data.device)
    found = weights.double()
    good = found.shape == (len(data),) and bool((found.isfinite() & (found >= 0)).all())
    if not good or float(found.sum()) <= 0:
        raise ValueError(
            f"BernoulliMixture.fit_em: weights of shape {tuple(weights.shape)} came for "
            f"{len(data)} data; give one finite number of at least 0 each, not all 0."
        )
    return found / found.mean()


def run_em(
    data: Tensor,
    k: int,
    weights: Tensor,
    a: float,
    steps: int,
    tolerance: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, list[float], bool]:
    """One run from random responsibilities, in float64 where it sums over data."""
    noise = torch.empty(len(data), k, dtype=torch.float64, device=data.device)
    resp = noise.exponential_(generator=generator)
    log_weights, logits = _maximise(data, resp / resp.sum(-1, keepdim=True), weights, a)
    history: list[float] = []
    converged = False
    for step in range(steps + 1):
        resp, mean = _expect(data, weights, log_weights, logits)
        history.append(mean + _log_prior(log_weights, logits, a) / float(weights.sum()))
        if step and history[-1] - history[-2] < tolerance and tolerance > 0:
            converged = True
            break
        if step < steps:
            log_weights, logits = _maximise(data, resp, weights, a)
    return log_weights, logits, history, converged


def _maximise(data: Tensor, resp: Tensor, weights: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """Return log weights and log odds of the mode, given responsibilities."""
    mass = resp * weights[:, None]
    counts = mass.sum(0)
    ones = torch.zeros(resp.shape[1], data.shape[1], dtype=torch.float64, device=data.device)
    for rows, part in zip(torch.split(data, ROWS), torch.split(mass, ROWS), strict=True):
        ones += part.mT @ rows.double()
    zeros = (counts[:, None] - ones).clamp_min(0.0)
    return (counts + a).log() - (counts + a).sum().log(), (ones + a).log() - (zeros + a).log()


def _expect(
    data: Tensor, weights: Tensor, log_weights: Tensor, logits: Tensor
) -> tuple[Tensor, float]:
    """Return responsibilities and the mean log-likelihood."""
    offset = log_weights - softplus(logits, threshold=50.0).sum(-1)
    joint = torch.cat([rows.double() @ logits.mT + offset for rows in torch.split(data, ROWS)])
    value = joint.logsumexp(-1)
    return (joint - value[:, None]).exp(), float((weights * value).sum() / weights.sum())


def _log_prior(log_weights: Tensor, logits: Tensor, a: float) -> float:
    """Return the log prior up to a constant: a pseudo-count of a on either side of every bit."""
    bits = -softplus(-logits, threshold=50.0) - softplus(logits, threshold=50.0)
    return a * float(bits.sum() + log_weights.sum())
