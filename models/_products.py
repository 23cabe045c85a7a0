"""Products of mixtures in closed form: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyroboost.models._em import LOG_2PI, Mixture

__all__ = [
    "MAX_COMPONENTS",
    "log_normal_at",
    "multiply_bernoullis",
    "multiply_gaussians",
    "repeats",
]

MAX_COMPONENTS = 4096
"""The largest number of components that a product in closed form may have."""


def repeats(sizes: Sequence[int], powers: Sequence[float]) -> list[tuple[int, float]] | None:
    """Return how each mixture enters: so many times, each time to this power.

    A mixture to a positive integer power is so many copies of it; a single component may have any
    power. ``None``: other powers, or more components than :data:`MAX_COMPONENTS`.
    """
    found: list[tuple[int, float]] = []
    total = 1
    for size, power in zip(sizes, powers, strict=True):
        if size == 1:
            found.append((1, power))
        elif power == round(power) and 1 <= power <= MAX_COMPONENTS:
            found.append((int(power), 1.0))
            total *= size ** int(power)
        else:
            return None
        if total > MAX_COMPONENTS:
            return None
    return found


class _Quadratic(NamedTuple):
    """Exponents c + b^T x - x^T A x / 2 of the components of an unnormalised mixture."""

    constant: Tensor  # (K,)
    slope: Tensor  # (K, D)
    precision: Tensor  # (K, D) diagonals, or (K, D, D)

    def times(self, other: _Quadratic) -> _Quadratic:
        """Multiply every component by every other."""
        return _Quadratic(
            *(
                (mine[:, None] + theirs).flatten(0, 1)
                for mine, theirs in zip(self, other, strict=True)
            )
        )


def _quadratic(mixture: Mixture, power: float, full: bool) -> _Quadratic:
    weights, locs, scale = (part.double() for part in mixture)
    if scale.dim() == 3:
        precision = torch.cholesky_inverse(scale)
        log_det = scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        precision = scale.square().reciprocal()
        log_det = scale.log().sum(-1)
        precision = precision.diag_embed() if full else precision
    slope = (precision @ locs[..., None]).squeeze(-1) if full else precision * locs
    constant = weights.log() - log_det - 0.5 * (locs.shape[-1] * LOG_2PI + (slope * locs).sum(-1))
    return _Quadratic(power * constant, power * slope, power * precision)


class GaussianProduct(NamedTuple):
    """A normalised mixture, log weights that keep what is tiny, and log Z of the product."""

    mixture: Mixture
    log_weights: Tensor  # (K,)
    log_partition: float


def multiply_gaussians(
    mixtures: Sequence[Mixture], copies: Sequence[tuple[int, float]]
) -> GaussianProduct:
    r"""Multiply mixtures of Gaussians and normalise the product, in double precision.

    $$\prod_i e^{c_i + b_i^\top x - \frac12 x^\top A_i x} = e^{c + b^\top x - \frac12 x^\top A x},
    \qquad \int = e^{c + \frac12 b^\top A^{-1} b} (2 \pi)^{D/2} |A|^{-1/2}$$

    Args:
        mixtures: the factors.
        copies: how often each enters and to which power, from :func:`repeats`.
    """
    full = any(mixture.is_full for mixture in mixtures)
    # Around their common centre the exponents stay small, so that little cancels.
    centre = torch.cat([mixture.locs.double() for mixture in mixtures]).mean(0)
    total: _Quadratic | None = None
    for mixture, (count, power) in zip(mixtures, copies, strict=True):
        factor = _quadratic(mixture.to(centre).shifted(-centre), power, full)
        for _ in range(count):
            total = factor if total is None else total.times(factor)
    assert total is not None
    constant, slope, precision = total
    if full:
        lower = torch.linalg.cholesky(precision)
        locs = torch.cholesky_solve(slope[..., None], lower).squeeze(-1)
        scale = torch.linalg.cholesky(torch.cholesky_inverse(lower))
        log_det = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        locs, scale = slope / precision, precision.rsqrt()
        log_det = 0.5 * precision.log().sum(-1)
    masses = constant + 0.5 * ((slope * locs).sum(-1) + locs.shape[-1] * LOG_2PI) - log_det
    log_partition = masses.logsumexp(0)
    log_weights = masses - log_partition
    mixture = Mixture(log_weights.exp(), locs + centre, scale)
    return GaussianProduct(mixture, log_weights, float(log_partition))


def multiply_bernoullis(
    mixtures: Sequence[tuple[Tensor, Tensor]], copies: Sequence[tuple[int, float]]
) -> tuple[Tensor, Tensor, float]:
    r"""Multiply mixtures of independent bits: log odds add, and what is left is a constant.

    $$\prod_i \mathrm{Bern}(x; \ell_i) = e^{-\sum_i \zeta(\ell_i) + \zeta(\sum_i \ell_i)}
    \,\mathrm{Bern}(x; \textstyle\sum_i \ell_i), \qquad \zeta(\ell) = \log(1 + e^\ell)$$

    Args:
        mixtures: log weights, (K,), and log odds, (K, D), of each factor.
        copies: how often each enters and to which power, from :func:`repeats`.

    Returns:
        Log weights, log odds and log Z of the product.
    """
    constant, odds = torch.zeros(1).double(), torch.zeros(1, mixtures[0][1].shape[1]).double()
    constant, odds = constant.to(mixtures[0][0].device), odds.to(mixtures[0][0].device)
    for (log_weights, logits), (count, power) in zip(mixtures, copies, strict=True):
        own = power * (log_weights.double() - softplus(logits.double(), threshold=50.0).sum(-1))
        for _ in range(count):
            constant = (constant[:, None] + own).flatten()
            odds = (odds[:, None] + power * logits.double()).flatten(0, 1)
    masses = constant + softplus(odds, threshold=50.0).sum(-1)
    log_partition = masses.logsumexp(0)
    return masses - log_partition, odds, float(log_partition)


def log_normal_at(x: float, locs: Tensor, scale: Tensor) -> Tensor:
    """Return log N(x; mu, sigma^2) entry by entry, (K, D)."""
    return -0.5 * (((x - locs) / scale).square() + LOG_2PI) - scale.log()
