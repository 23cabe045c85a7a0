"""Monotone rational-quadratic splines, and their inverse, as one function of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["MINIMUM", "size_of_spline", "spline"]

MINIMUM = 1e-3  # least width and height of a bin as a share of the box, and least slope at a knot
_UNIT_SLOPE = math.log(math.expm1(1 - MINIMUM))  # a raw slope of zero then means a slope of one


def size_of_spline(bins: int) -> int:
    """Count the numbers behind one spline: K widths, K heights, K - 1 slopes at inner knots."""
    return 3 * bins - 1


def _knots(raw: Tensor, bound: float) -> Tensor:
    """Return the K + 1 knots from -bound to bound that K raw numbers stand for."""
    bins = raw.shape[-1]
    shares = MINIMUM + (1 - MINIMUM * bins) * raw.softmax(-1)
    inner = 2 * bound * shares.cumsum(-1)[..., :-1] - bound
    edge = torch.full_like(raw[..., :1], bound)  # exact ends, free of the sum's rounding
    return torch.cat([-edge, inner, edge], -1)


def _root(s: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """Solve (s - b) t^2 + b t - s v = 0 for the root t between 0 and 1.

    Newton steps after the closed form remove its rounding and carry the derivatives: the square
    root's own would be infinite where rounding takes its argument to zero.
    """
    a, c = s - b, s * v
    with torch.no_grad():
        # Positive on paper; of the two forms of the root, the one that adds equal signs.
        size = b.abs() + (b * b + 4 * a * c).relu().sqrt()
        root = torch.where(b >= 0, 2 * c / size, size / (2 * torch.where(b >= 0, 1.0, a)))
    for _ in range(2):
        root = root - ((a * root + b) * root - c) / (2 * a * root + b)
    return root


def spline(x: Tensor, raw: Tensor, bound: float, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    r"""Map each number through its own spline, the identity outside (-bound, bound).

    With :math:`\theta` the place within a bin of width w and height h, slope
    :math:`s = h / w` and knot slopes :math:`d_0, d_1`,

    .. math:: y = y_0 + h \frac{s\theta^2 + d_0\theta(1-\theta)}
        {s + (d_0 + d_1 - 2s)\theta(1-\theta)}

    Args:
        x: numbers.  # (*S)
        raw: 3K - 1 numbers behind each spline.  # broadcasts to (*S, 3K - 1)
        bound: half the box's width.
        inverse: run it backwards.

    Returns:
        The images, and the log of the derivative of the direction that was run.  # (*S), (*S)
    """
    bins = (raw.shape[-1] + 1) // 3
    inside = x.abs() < bound
    z = torch.where(inside, x, 0.0)  # no infinities, also not in the unused branch's gradient
    across, up = (_knots(part, bound) for part in (raw[..., :bins], raw[..., bins : 2 * bins]))
    inner = MINIMUM + torch.nn.functional.softplus(raw[..., 2 * bins :] + _UNIT_SLOPE)
    one = torch.ones_like(across[..., :1])
    slopes = torch.cat([one, inner, one], -1)
    index = (z[..., None] >= (up if inverse else across)[..., 1:-1]).sum(-1, keepdim=True)

    def pick(values: Tensor, offset: int) -> Tensor:
        return values.expand(*z.shape, -1).gather(-1, index + offset).squeeze(-1)

    x0, y0, d0 = (pick(values, 0) for values in (across, up, slopes))
    w, h, d1 = pick(across, 1) - x0, pick(up, 1) - y0, pick(slopes, 1)
    s = h / w
    bend = d0 + d1 - 2 * s
    if inverse:
        v = (z - y0) / h
        b = d0 - v * bend
        theta = _root(s, b, v)
        out = x0 + theta * w
    else:
        theta = (z - x0) / w
        out = y0 + h * theta * (s * theta + d0 * (1 - theta)) / (s + bend * theta * (1 - theta))
    rest = 1 - theta
    top = d1 * theta * theta + 2 * s * theta * rest + d0 * rest * rest
    log_slope = 2 * s.log() + top.log() - 2 * (s + bend * theta * rest).log()
    log_slope = -log_slope if inverse else log_slope
    return torch.where(inside, out, x), torch.where(inside, log_slope, 0.0)
