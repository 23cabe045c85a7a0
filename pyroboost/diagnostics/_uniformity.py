"""Exact tests of symmetry and calibrated tests of uniformity for probabilities in [0, 1]."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["band", "symmetry", "uniformity"]

Array = NDArray[np.float64]
_SIMULATED = 2000


def symmetry(p: Array) -> float:
    r"""Test that p and 1 - p have one law, by the Kolmogorov-Smirnov distance of the two.

    $$D = \sup_t |F_p(t) - F_{1-p}(t)| = \max_k |S_k| / R$$

    where $S_k$ sums the signs of the k largest $|p - 1/2|$. Under symmetry they are a random walk,
    whatever the law of p, and its law is summed exactly.
    """
    offset = p - 0.5
    signs = np.sign(offset[np.argsort(-np.abs(offset), kind="stable")])
    largest = int(np.abs(np.cumsum(signs)).max())
    return _walk(len(p), largest)


@lru_cache(maxsize=4096)
def _walk(steps: int, level: int) -> float:
    """P(max |S_k| >= level, k <= steps) for a simple random walk."""
    if level < 1:
        return 1.0
    inside = np.zeros(2 * level + 1)  # states -level..level; the ends absorb
    inside[level] = 1.0
    for _ in range(steps):
        moved = np.zeros_like(inside)
        moved[:-1] += 0.5 * inside[1:]
        moved[1:] += 0.5 * inside[:-1]
        moved[0] = moved[-1] = 0.0
        inside = moved
    return float(max(0.0, 1.0 - inside.sum()))


def uniformity(p: Array) -> float:
    """Test that p is uniform: the least tail probability of its ECDF, calibrated by simulation."""
    count = len(p)
    return float((1 + (_null(count) <= _least(p[None])[0] * (1 + 1e-9)).sum()) / (_SIMULATED + 1))


def band(count: int, level: float = 0.95) -> tuple[Array, Array, Array]:
    """Return points and the band in which all of a uniform ECDF lies with this probability."""
    from scipy.stats import binom

    z = _grid(count)
    gamma = float(np.quantile(_null(count), 1 - level))
    return z, binom.ppf(gamma / 2, count, z) / count, binom.ppf(1 - gamma / 2, count, z) / count


def _grid(count: int) -> Array:
    points = min(count, 50)
    grid: Array = np.arange(1, points) / points
    return grid


def _least(p: Array) -> Any:
    """Return the least two-sided pointwise probability of each row's ECDF.  # (B, R)."""
    from scipy.stats import binom

    count = p.shape[1]
    z = _grid(count)
    below = (p[:, :, None] <= z).sum(1) if p.size * len(z) < 2**22 else _counts(p, z)
    tails = np.minimum(binom.cdf(below, count, z), binom.sf(below - 1, count, z))
    return np.minimum(1.0, 2 * tails).min(1)


def _counts(p: Array, z: Array) -> Any:
    return np.stack([np.searchsorted(np.sort(row), z, side="right") for row in p])


@lru_cache(maxsize=64)
def _null(count: int) -> Array:
    # Its own stream: a test neither reads nor moves anybody's random state.
    null: Array = _least(np.random.default_rng(0).uniform(size=(_SIMULATED, count)))
    return null
