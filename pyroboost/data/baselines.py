"""What the simplest models of bits reach, for every other model to be held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroboost.likelihood import Likelihood

__all__ = ["independent_bernoulli_log_likelihood", "uniform_log_likelihood"]


def uniform_log_likelihood(num_bits: int) -> float:
    r"""Return the log-likelihood of any datum when all bit strings are equally likely.

    $\log p(x) = -D \log 2$.

    Args:
        num_bits: D.

    Returns:
        Nats per datum.

    Example:
        >>> round(uniform_log_likelihood(100), 2)
        -69.31
    """
    return -num_bits * math.log(2.0)


def independent_bernoulli_log_likelihood(
    train: Tensor, test: Tensor, *, smoothing: float = 0.0
) -> Likelihood:
    r"""Return the log-likelihood of data under independent bits fitted to other data.

    With $q_d = (\sum_n x_{nd} + s) / (N + 2 s)$ from the training data,
    $\log p(x) = \sum_d x_d \log q_d + (1 - x_d) \log(1 - q_d)$. Grey levels stand for the
    probabilities of ones, and the value is then the expectation over such bits.

    Args:
        train: bits or grey levels in [0, 1].  # (N, D)
        test: the same.  # (M, D)
        smoothing: s; at 0 (maximum likelihood) a held-out pixel that never varied in training
            costs minus infinity.

    Returns:
        Exact values, in nats.  # (M,)

    Raises:
        ValueError: shapes that do not fit, values outside [0, 1], or a negative smoothing.

    Example:
        >>> from pyroboost.data import tea_images
        >>> round(independent_bernoulli_log_likelihood(tea_images(), tea_images()).mean, 2)
        -48.04
    """
    if train.dim() != 2 or test.dim() != 2 or train.shape[1] != test.shape[1] or not len(train):
        raise ValueError(
            f"independent_bernoulli_log_likelihood: train has shape {tuple(train.shape)} and test "
            f"{tuple(test.shape)}; pass rows of one length, at least one for training."
        )
    for name, part in (("train", train), ("test", test)):
        if not bool(((part >= 0) & (part <= 1)).all()):
            raise ValueError(
                f"independent_bernoulli_log_likelihood: {name} has values outside [0, 1]; pass "
                "bits or grey levels."
            )
    if smoothing < 0:
        raise ValueError(
            f"independent_bernoulli_log_likelihood: smoothing is {smoothing}; take 0 or more."
        )
    x = test.double()
    ones = train.double().sum(0)
    total = math.log(len(train) + 2 * smoothing)
    # Both sides are logged from counts: 1 - q would lose digits where q is nearly 1.
    log_one = torch.xlogy(x, ones + smoothing) - x * total
    log_zero = torch.xlogy(1 - x, len(train) - ones + smoothing) - (1 - x) * total
    return Likelihood((log_one + log_zero).sum(1), "exact")
