"""Averages, errors and resampling of importance weights given as natural logarithms.

The first dimension of a table of log weights counts samples; all others, such as data, are
treated separately, so that one estimate per datum never turns into one estimate per data set.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "LogMean",
    "effective_sample_size",
    "log_mean_exp",
    "normalised_weights",
    "resample",
]


class LogMean(NamedTuple):
    """The logarithm of a mean of importance weights, with what is known of its error.

    Attributes:
        value: log of the mean weight, in nats.  # (*N,)
        std_error: standard deviation of the mean weight divided by the mean weight. This is the
            relative error on the natural scale and, by the delta method, the standard error
            of `value` in nats; NaN where it cannot be known (one sample, or no weight at all).
        ess: effective sample size, between 1 and S; 0 where every weight is zero.
    """

    value: Tensor
    std_error: Tensor
    ess: Tensor


def log_mean_exp(log_weights: Tensor) -> LogMean:
    r"""Average importance weights without leaving the logarithmic scale.

    .. math:: \log \hat p = \log \frac{1}{S} \sum_s w_s, \qquad
        \mathrm{se} = \frac{1}{\bar w} \sqrt{\frac{\sum_s (w_s - \bar w)^2}{S (S - 1)}}

    The mean weight is unbiased on the natural scale; its logarithm is biased low by about
    half the squared standard error, and the error itself is only as good as the largest weights
    seen: compare the effective sample size.

    Args:
        log_weights: natural logarithms of the weights.  # (S, *N)

    Returns:
        The log mean weight in nats, its standard error and the effective sample size, each of
        shape (*N,).

    Raises:
        ValueError: if there is no sample, or a log weight is NaN or plus infinity.

    Example:
        >>> log_weights = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> estimate = log_mean_exp(log_weights)
        >>> estimate.value.tolist(), estimate.std_error.tolist(), estimate.ess.tolist()
        ([0.0, 1.0], [0.0, 0.0], [2.0, 2.0])

    Reference:
        Owen, Monte Carlo theory, methods and examples (2013), section 9.2.
    """
    _check("log_mean_exp", log_weights)
    scaled, largest = _scaled(log_weights)
    mean = scaled.mean(0)
    count = scaled.shape[0]
    empty = mean == 0
    safe_mean = mean.masked_fill(empty, 1.0)
    if count > 1:
        relative = (scaled / safe_mean - 1.0).square().sum(0).div(count * (count - 1)).sqrt()
        relative = relative.masked_fill(empty, math.nan)
    else:
        relative = torch.full_like(mean, math.nan)
    return LogMean(mean.log() + largest, relative, _ess(scaled))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""Count the equally weighted samples that would have the variance of these weights.

    .. math:: \mathrm{ESS} = \left(\sum_s w_s\right)^2 / \sum_s w_s^2

    Args:
        log_weights: natural logarithms of the weights.  # (S, *N)

    Returns:
        The effective sample size, between 1 and S, or 0 where every weight is zero.  # (*N,)

    Raises:
        ValueError: if there is no sample, or a log weight is NaN or plus infinity.

    Example:
        >>> effective_sample_size(torch.tensor([0.0, 0.0, -torch.inf])).item()
        2.0

    Reference:
        Kong, A note on importance sampling using standardized weights (1992).
    """
    _check("effective_sample_size", log_weights)
    return _ess(_scaled(log_weights)[0])


def normalised_weights(log_weights: Tensor) -> Tensor:
    r"""Turn log weights into self-normalised weights, :math:`w_s / \sum_t w_t`.

    Args:
        log_weights: natural logarithms of the weights.  # (S, *N)

    Returns:
        Weights that are not negative and sum to one over the samples.  # (S, *N)

    Raises:
        ValueError: if there is no sample, a log weight is NaN or plus infinity, or all weights
            of one column are zero.

    Example:
        >>> normalised_weights(torch.tensor([0.0, 0.0, -torch.inf])).tolist()
        [0.5, 0.5, 0.0]

    Reference:
        Owen, Monte Carlo theory, methods and examples (2013), section 9.2.
    """
    _check("normalised_weights", log_weights)
    if bool((log_weights.amax(0) == -math.inf).any()):
        raise ValueError(
            "normalised_weights: every weight of one column is zero, so they cannot be scaled to "
            "sum to one; draw more samples or use a proposal that covers the target."
        )
    return torch.softmax(log_weights, dim=0)


def resample(
    log_weights: Tensor,
    num_samples: int | None = None,
    *,
    method: Literal["multinomial", "systematic"] = "multinomial",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw sample indices with probabilities in proportion to their weights.

    Index s is expected :math:`M w_s / \sum_t w_t` times among M draws. Multinomial draws are
    independent; systematic draws share one uniform number per column, so that each index
    occurs the expected number of times rounded down or up, which has less variance.

    Args:
        log_weights: natural logarithms of the weights.  # (S, *N)
        num_samples: number of draws M per column; the number of samples S when not given.
        method: "multinomial" or "systematic".
        generator: source of randomness on the device of the weights; torch's own by default.

    Returns:
        Indices into the first dimension of `log_weights`.  # (M, *N)

    Raises:
        ValueError: if the weights cannot be normalised, or `method` or `num_samples` is not
            one of those described.

    Example:
        >>> resample(torch.tensor([-torch.inf, 0.0]), 3, method="systematic").tolist()
        [1, 1, 1]

    Reference:
        Douc, Cappe and Moulines, Comparison of resampling schemes (2005), sections 2.1 and 2.4.
    """
    count = log_weights.shape[0] if num_samples is None else num_samples
    if count < 1:
        raise ValueError(f"resample: num_samples is {count}; ask for at least one draw.")
    weights = normalised_weights(log_weights).to(torch.float64)
    flat = weights.reshape(weights.shape[0], -1).T  # (N, S)
    columns = flat.shape[0]
    if method == "multinomial":
        points = flat.new_empty(columns, count).uniform_(generator=generator)
    elif method == "systematic":
        steps = torch.arange(count, dtype=flat.dtype, device=flat.device)
        points = (steps + flat.new_empty(columns, 1).uniform_(generator=generator)) / count
    else:
        raise ValueError(f"resample: method is {method!r}; use 'multinomial' or 'systematic'.")
    cumulative = flat.cumsum(-1)
    # Rounding may lift a point onto the total, beyond the last index that has any weight.
    points = (points * cumulative[:, -1:]).minimum(cumulative[:, -1:] * (1 - 2.0**-52))
    indices = torch.searchsorted(cumulative.contiguous(), points.contiguous(), right=True)
    return indices.T.reshape(count, *log_weights.shape[1:])


def _check(where: str, log_weights: Tensor) -> None:
    if log_weights.dim() == 0 or log_weights.shape[0] == 0:
        raise ValueError(
            f"{where}: the log weights have shape {tuple(log_weights.shape)}; give at least one "
            "sample along the first dimension."
        )
    if bool((log_weights.isnan() | (log_weights == math.inf)).any()):
        raise ValueError(
            f"{where}: a log weight is NaN or plus infinity; check the densities that produced it."
        )


def _scaled(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the weights by the largest of their column, which is returned as a logarithm."""
    largest = log_weights.amax(0)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    return (log_weights - largest).exp(), largest


def _ess(scaled: Tensor) -> Tensor:
    squares = scaled.square().sum(0)
    return scaled.sum(0).square() / squares.masked_fill(squares == 0, 1.0)
