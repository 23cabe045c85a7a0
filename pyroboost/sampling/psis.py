"""Pareto-smoothed importance sampling, one fit per datum."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroboost import _arviz
from pyroboost.sampling.importance import resample

__all__ = ["Smoothed", "good_k", "pareto_k", "psis", "psis_resample"]

_LEAST = 25
_LEAST_TAIL = 5
_BLOCK = 2**22  # weights that are smoothed at once


class Smoothed(NamedTuple):
    """Smoothed weights and what the smoothing found.

    Attributes:
        log_weights: logarithms of weights that sum to one over the draws.  # (S, *N)
        pareto_k: shape of the tail of the raw weights.  # (*N,)
    """

    log_weights: Tensor
    pareto_k: Tensor


def good_k(num_samples: int) -> float:
    r"""Return the largest Pareto k at which S draws can be reweighted.

    $$\min(1 - 1 / \log_{10} S, 0.7)$$

    Args:
        num_samples: draws S.

    Example:
        >>> good_k(100), good_k(10_000)
        (0.5, 0.7)

    Reference:
        Vehtari et al., Pareto smoothed importance sampling (2024), section 3.2.4.
    """
    return _arviz.good_k(num_samples)


def psis(log_weights: Tensor, *, tolerance: float | None = None) -> Smoothed:
    r"""Fit a generalised Pareto law to the largest weights of each datum and smooth them by it.

    The tail of $w = p/q$ behaves as $P(w > t) \propto t^{-1/k}$: the mean of w exists for
    $k < 1$, its variance for $k < 1/2$.

    1. Weights that are constant up to rounding, and weights whose largest ones are all equal (an
       atom, as discrete hidden sites have), have no tail: k is minus infinity, nothing is smoothed.
    2. Where fewer than five draws stand above the rest, or all weights are zero, there is no tail
       to fit: k is plus infinity, nothing is smoothed.

    Args:
        log_weights: $\log p - \log q$ in nats, of independent draws from q.  # (S, *N)
        tolerance: differences in nats that are only rounding; 32 units in the last place of the
            largest log weight of each datum when left out.

    Returns:
        Smoothed normalised log weights and Pareto k, in the dtype of the weights.

    Raises:
        ValueError: fewer than 25 draws, or a log weight that is NaN or plus infinity.

    Example:
        >>> table = torch.zeros(100, 3)
        >>> psis(table).pareto_k.tolist()
        [-inf, -inf, -inf]
        >>> psis(torch.randn(100, 3)).log_weights.logsumexp(0).abs().max().item() < 1e-5
        True

    Reference:
        Vehtari, Simpson, Gelman, Yao and Gabry, Pareto smoothed importance sampling (2024).
    """
    _check(log_weights)
    flat = log_weights.detach().reshape(len(log_weights), -1)
    blocks = [_smooth(b, tolerance) for b in torch.split(flat, max(1, _BLOCK // len(flat)), dim=1)]
    table = torch.cat([block.log_weights for block in blocks], dim=1)
    k = torch.cat([block.pareto_k for block in blocks])
    return Smoothed(
        table.reshape(log_weights.shape), k.reshape(log_weights.shape[1:]).to(log_weights)
    )


def _smooth(columns: Tensor, tolerance: float | None) -> Smoothed:
    """Smooth the weights of some data, (S, B), in float64 on the CPU."""
    rows = columns.T.to("cpu", torch.float64).contiguous()
    none, unknown = _tails(rows, columns.dtype, tolerance)
    smoothed = (rows - rows.logsumexp(-1, keepdim=True)).nan_to_num(nan=-math.inf)
    k = torch.full((len(rows),), math.nan, dtype=torch.float64)
    k[none], k[unknown] = -math.inf, math.inf
    fitted = ~(none | unknown)
    if bool(fitted.any()):
        found, shape = (torch.from_numpy(a) for a in _arviz.smooth(rows[fitted].numpy()))
        failed = ~shape.isfinite()
        k[fitted] = shape.masked_fill(failed, math.inf)
        smoothed[fitted] = torch.where(failed[:, None], smoothed[fitted], found)
    return Smoothed(smoothed.T.to(columns), k)


def pareto_k(log_weights: Tensor) -> Tensor:
    """Return Pareto k of each datum; see :func:`psis`.

    Args:
        log_weights: log p - log q in nats.  # (S, *N)

    Returns:
        Shapes.  # (*N,)

    Raises:
        ValueError: fewer than 25 draws, or a log weight that is NaN or plus infinity.

    Example:
        >>> pareto_k(torch.randn(100, 3)).shape
        torch.Size([3])
    """
    return psis(log_weights).pareto_k


def psis_resample(
    log_weights: Tensor,
    num_samples: int | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw indices of draws in proportion to their smoothed weights.

    Args:
        log_weights: log p - log q in nats.  # (S, *N)
        num_samples: indices per datum; S when left out.
        generator: source of randomness; torch's own by default.

    Returns:
        Indices into the draws, systematically resampled and shuffled.  # (M, *N)

    Raises:
        ValueError: the weights cannot be smoothed, or are all zero for one datum.

    Example:
        >>> psis_resample(torch.randn(100, 3), 10).shape
        torch.Size([10, 3])
    """
    chosen = resample(
        psis(log_weights).log_weights, num_samples, method="systematic", generator=generator
    )
    # Systematic draws come sorted: in different columns they would belong together by rank.
    keys = torch.rand(chosen.shape, generator=generator, device=chosen.device)
    return chosen.gather(0, keys.argsort(0))


def _check(log_weights: Tensor) -> None:
    draws = len(log_weights) if log_weights.dim() else 0
    if draws < _LEAST:
        raise ValueError(
            f"psis: {draws} draws are too few to fit a tail; take at least {_LEAST}, along the "
            "first dimension."
        )
    bad = log_weights.isnan() | (log_weights == math.inf)
    if bool(bad.any()):
        raise ValueError(
            f"psis: {int(bad.sum())} of {bad.numel()} log weights are NaN or plus infinity; check "
            "the densities that produced them."
        )


def _tails(rows: Tensor, dtype: torch.dtype, tolerance: float | None) -> tuple[Tensor, Tensor]:
    """Tell which rows have no tail and which have too little of one to fit it."""
    draws = rows.shape[-1]
    size = math.ceil(min(draws / 5, 3 * math.sqrt(draws)))
    top = rows.topk(size + 1, dim=-1).values
    largest = top[:, :1]
    if tolerance is None:
        same = 32 * torch.finfo(dtype).eps * largest.abs().clamp(min=1.0)
    else:
        same = torch.full_like(largest, tolerance)
    above = top > top[:, -1:] + same
    at_largest = top >= largest - same
    empty = largest[:, 0] == -math.inf
    atom = (at_largest.sum(-1) >= _LEAST_TAIL) & (at_largest | ~above).all(-1)
    return atom & ~empty, empty | (~atom & (above.sum(-1) < _LEAST_TAIL))
