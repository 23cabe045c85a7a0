"""Importance weights per datum, and the draws under which a pair's own bound is taken."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyroboost.metamodel import MetaModel
from pyroboost.sampling import resample
from pyroboost.weights import Draw, draw, log_weights, row_blocks, take_rows

__all__ = [
    "Draw",
    "bound_draw",
    "draw",
    "log_weights",
    "resampled_draw",
    "row_blocks",
    "take_rows",
]


def resampled_draw(pair: MetaModel, x: Tensor, *args: Any, num_samples: int) -> Draw:
    r"""Draw the hidden variables K times per datum and keep one draw in proportion to its weight.

    $$\log w = \log \frac1K \sum_{k=1}^K w_k, \qquad
    h = h_k \text{ with probability } \tilde w_k = w_k / \textstyle\sum_j w_j$$

    The law of that h is the self-normalised $Q(h \mid x)$, and at h a stage above may be scored:
    with $r_k = m_2(h_k) / m_1(h_k)$, the composed pair's weights are $w_k r_k$ and
    $\log \frac1K \sum_k w_k r_k \ge \log \frac1K \sum_k w_k + \sum_k \tilde w_k \log r_k$, so that

    $$\mathbb{E} \log \frac1K \sum_k w_k + \mathbb{E}_Q [\log m_2(h) - \log m_1(h)] \le
    \mathcal{L}_K(\text{composed pair}) \le \log p(x).$$

    A lower bound in place of $\log m_2$ keeps the sum below $\log p(x)$.

    Args:
        pair: a meta-model.
        x: data.  # (N, ...)
        *args: further arguments; tensors with N rows are repeated with the data.
        num_samples: draws per datum K.

    Returns:
        The draw that was kept, with the log of the mean weight as its log weight, in nats.

    Raises:
        ValueError: a pair without densities per datum, or whose plates have a fixed size.

    Example:
        >>> from pyroboost.models import VAE
        >>> resampled_draw(VAE(6, 2, units=8), torch.zeros(5, 6), num_samples=3).hidden.shape
        torch.Size([5, 2])

    Reference:
        Cremer et al., Reinterpreting importance-weighted autoencoders (2017), section 3.
    """
    count = len(x)
    drawn = draw(pair, *take_rows((x, *args), slice(None), count, num_samples))
    if len(drawn.log_weight) != num_samples * count:
        raise ValueError(
            f"resampled_draw: {type(pair).__name__} gave {len(drawn.log_weight)} weights for "
            f"{num_samples * count} rows; let its plates follow the number of data."
        )
    weights = drawn.log_weight.reshape(num_samples, count)
    chosen = resample(weights, 1)[0]
    rows = chosen * count + torch.arange(count, device=chosen.device)
    bound = weights.logsumexp(0) - math.log(num_samples)
    return Draw(drawn.hidden[rows], bound, drawn.log_prior[rows])


def bound_draw(pair: MetaModel, x: Tensor, *args: Any) -> Draw:
    r"""Draw the hidden variables as the pair's own bound sees them, and return its term.

    For a pair that sees its data through one sample this is :func:`draw`. For one with
    ``num_particles`` K > 1, such as an IWAE, it is :func:`resampled_draw` with that K: log m(h)
    and q(h | x) of such a stage are taken under the self-normalised law, which its ``encode``
    draws as well.

    Args:
        pair: a meta-model.
        x: data.  # (N, ...)
        *args: further arguments of the pair.

    Returns:
        Hidden values, one draw of the pair's own bound, and log m(h), in nats.

    Example:
        >>> from pyroboost.models import IWAE
        >>> bound_draw(IWAE(6, 2, num_samples=3, units=8), torch.zeros(5, 6)).log_weight.shape
        torch.Size([5])
    """
    if pair.num_particles == 1:
        return draw(pair, x, *args)
    return resampled_draw(pair, x, *args, num_samples=pair.num_particles)
