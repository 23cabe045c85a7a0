"""One step of additive boosting on log densities: weights, line search, derivative."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroboost.sampling import effective_sample_size

__all__ = ["Slope", "Tempered", "best_weight", "mean_and_error", "slope_at_zero", "tempered"]

_HALVINGS = 60
_CLOSE_TO_ZERO = 0.01


class Tempered(NamedTuple):
    r"""Weights of data, $\propto q(x_n)^{-\beta}$, of mean 1.

    Args:
        weights: one per datum.  # (N,)
        beta: the power.
        ess: their effective sample size.
    """

    weights: Tensor
    beta: float
    ess: float


def mean_and_error(values: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """Return the mean over data, each with its weight, and its standard error.

    Args:
        values: one per datum.  # (N,)
        weights: of the data; ``None``: all alike.  # (N,)

    Example:
        >>> mean_and_error(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]))
        (3.0, 0.0)
    """
    if weights is None:
        return float(values.mean()), float(values.std()) / math.sqrt(len(values))
    share = weights.to(values) / weights.to(values).sum()
    mean = share @ values
    return float(mean), float((share * (values - mean)).square().sum().sqrt())


def tempered(
    log_q: Tensor, ess: float, *, beta: float | None = None, weights: Tensor | None = None
) -> Tempered:
    r"""Weigh data by $1 / q^\beta$ with the largest $\beta \le 1$ that leaves enough of them.

    Args:
        log_q: log densities.  # (N,)
        ess: least effective sample size, as a fraction of N; 0 keeps $\beta = 1$.
        beta: the power, where it is known already.
        weights: weights that the data have already; ``ess`` is then a fraction of the effective
            sample size that these leave.  # (N,)

    Raises:
        ValueError: a density is 0 or not a number.

    Example:
        >>> found = tempered(torch.tensor([0.0, 0.0, -50.0]), 0.5)
        >>> found.beta < 0.1, round(found.ess, 3)
        (True, 1.5)

    Reference:
        Rosset and Segal, Boosting density estimation (2002), section 2.
    """
    log_q = log_q.double()
    if not bool(torch.isfinite(log_q).all()):
        raise ValueError(
            f"Mixture.rounds: the density of {int((~log_q.isfinite()).sum())} data is 0 or not a "
            "number, so that 1/q is no weight; start from a part that gives all data some density."
        )

    own: Tensor | float = 0.0 if weights is None else weights.to(log_q).log()

    def left(power: float) -> float:
        return float(effective_sample_size(own - power * log_q))

    least = ess * (len(log_q) if weights is None else left(0.0))
    if beta is None:
        beta = 1.0
        if left(1.0) < least:
            low, high = 0.0, 1.0
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if left(middle) >= least else (low, middle)
            beta = low
    found = torch.softmax(own - beta * log_q, 0) * len(log_q)
    return Tempered(found.to(torch.get_default_dtype()), beta, left(beta))


def _slopes(delta: Tensor, w: float) -> Tensor:
    r"""Return the derivative of each datum's $\log((1 - w) q + w m)$, with $\delta = \log m/q$."""
    up = -torch.expm1(-delta) / ((1 - w) * torch.exp(-delta) + w)
    down = torch.expm1(delta) / ((1 - w) + w * torch.exp(delta))
    return torch.where(delta > 0, up, down)


def _ratio(log_q: Tensor, log_m: Tensor) -> Tensor:
    """Return log m/q, 0 where both densities are 0: such data have no say."""
    both = (log_q == -math.inf) & (log_m == -math.inf)
    return (log_m.double() - log_q.double()).masked_fill(both, 0.0)


def best_weight(log_q: Tensor, log_m: Tensor, weights: Tensor | None = None) -> float:
    r"""Maximise $\frac1N \sum_n \log((1 - w)\, q(x_n) + w\, m(x_n))$ over w in [0, 1].

    The sum is concave in w: its derivative is halved down to one part in $2^{60}$, and the
    ends are taken where it does not change its sign.

    Args:
        log_q: log densities of the mixture so far.  # (N,)
        log_m: those of the new part.  # (N,)
        weights: of the data; ``None``: all alike.  # (N,)

    Example:
        >>> best_weight(torch.tensor([0.0, -99.0]), torch.tensor([-99.0, 0.0]))
        0.5
    """
    delta = _ratio(log_q, log_m)

    def derivative(w: float) -> float:
        return mean_and_error(_slopes(delta, w), weights)[0]

    if not derivative(0.0) > 0.0:
        return 0.0
    if not derivative(1.0) < 0.0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if derivative(middle) > 0.0 else (low, middle)
    return (low + high) / 2


class Slope(NamedTuple):
    r"""The derivative of the log-likelihood where the new part's weight is 0.

    Args:
        ratio: mean of $m / q$; the derivative at $w = 0$ is this less 1.
        ratio_error: its standard error, itself uncertain where the ratios have heavy tails.
        near: the derivative at $w = 0.01$, whose terms are at most 100; by concavity the one at
            0 is no smaller.
        near_error: its standard error.
    """

    ratio: float
    ratio_error: float
    near: float
    near_error: float

    @property
    def positive(self) -> bool:
        """Whether the derivative at 0 is above 0 by more than two standard errors."""
        return self.ratio - 1.0 > 2 * self.ratio_error or self.near > 2 * self.near_error


def slope_at_zero(
    log_q: Tensor,
    log_m: Tensor,
    variance: Tensor | float = 0.0,
    weights: Tensor | None = None,
) -> Slope:
    r"""Estimate $E[m/q]$, above 1 exactly where a little of m added to q raises the likelihood.

    Where q is estimated with relative variance v, $E[1/\hat q] \approx (1 + v) / q$: without
    that factor a part that is as good as q would pass for a gain.

    Args:
        log_q: log densities of the mixture so far.  # (N,)
        log_m: those of the new part.  # (N,)
        variance: relative variance of q's estimates.  # (N,)
        weights: of the data; ``None``: all alike.  # (N,)

    Example:
        >>> slope_at_zero(torch.zeros(4), torch.zeros(4)).positive
        False

    Reference:
        Rosset and Segal, Boosting density estimation (2002), section 2: the stopping criterion.
    """
    delta = _ratio(log_q, log_m) - torch.log1p(torch.as_tensor(variance, dtype=torch.float64))
    near = _slopes(delta, _CLOSE_TO_ZERO)
    return Slope(*mean_and_error(delta.exp(), weights), *mean_and_error(near, weights))
