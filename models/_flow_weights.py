"""Weights of a mixture from the log densities of its components at data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["log_mixture", "nearest", "solve_weights"]

_TOLERANCE = 1e-9  # in nats per datum


def log_mixture(table: Mapping[int, Tensor], weights: Tensor) -> Tensor:
    """Return log sum_c w_c g_c(x_n) from log densities by component, (N,)."""
    on = [c for c in table if weights[c] > 0]
    terms = torch.stack([table[c] for c in on], -1)
    return (terms + weights[on].to(terms).log()).logsumexp(-1)


def solve_weights(
    table: Mapping[int, Tensor],
    start: Tensor,
    shares: Tensor | None = None,
    *,
    max_iterations: int = 1000,
    least: float = 1e-4,
) -> Tensor:
    r"""Maximise the log-likelihood of a mixture in its weights, with the components as they are.

    $$\max_w \sum_n v_n \log \sum_c w_c\, g_c(x_n), \qquad
    w_c \leftarrow \frac{\sum_n v_n r_{nc}}{\sum_n v_n}, \qquad
    r_{nc} = \frac{w_c g_c(x_n)}{\sum_k w_k g_k(x_n)}$$

    The problem is concave, and each step of EM raises it. A component that starts with weight 0
    keeps it; one that ends below ``least`` is given 0. Where no density of some datum is finite
    the start is returned.

    Args:
        table: log densities by component, each (N,).
        start: weights of all components to start from, (K,).
        shares: weights v of the data.  # (N,)
        max_iterations: steps at most.
        least: weight below which a component is dropped.

    Returns:
        The weights, (K,), in double precision.

    Example:
        >>> table = {0: torch.tensor([0.0, -50.0, -50.0]), 1: torch.tensor([-50.0, 0.0, 0.0])}
        >>> [round(w, 3) for w in solve_weights(table, torch.tensor([0.5, 0.5])).tolist()]
        [0.333, 0.667]

    Reference:
        Dempster, Laird and Rubin (1977), "Maximum likelihood from incomplete data", section 4.3.
    """
    weights = start.double().clone()
    on = [c for c in table if weights[c] > 0]
    logs = torch.stack([table[c].double() for c in on], -1)
    shares = logs.new_ones(len(logs)) if shares is None else shares.to(logs)
    shares = shares / shares.sum()
    w, last = weights[on].to(logs), -math.inf
    for _ in range(max_iterations):
        joint = logs + w.log()
        value = joint.logsumexp(-1)
        now = float(shares @ value)
        if not now - last >= _TOLERANCE:
            break
        w, last = shares @ (joint - value[:, None]).exp(), now
    w = torch.where(w < least, 0.0, w)
    weights[on] = (w / w.sum()).to(weights)
    return weights


def nearest(points: Tensor, weights: Tensor, share: float) -> Tensor:
    """Return which of the data lie nearest to one drawn in proportion to its weight.

    Args:
        points: data.  # (N, D)
        weights: of the data.  # (N,)
        share: of the data that are near.

    Returns:
        A mask.  # (N,)
    """
    centre = points[int(torch.multinomial(weights.double(), 1))]
    distance = (points - centre).square().sum(-1)
    count = max(2, math.ceil(share * len(points)))
    return distance <= distance.kthvalue(min(count, len(points))).values
