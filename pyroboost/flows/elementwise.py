"""Steps that move every coordinate by itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroboost.flows._splines import MINIMUM, size_of_spline, spline
from pyroboost.flows.step import Coefficients, CoefficientStep

__all__ = ["Affine", "NonlinearSquared", "Spline"]

LARGEST = 8 * math.sqrt(3) / 9  # of |c| d / b, where the derivative touches zero
SHARE = 0.98  # of it that is used: the derivative stays above (1 - SHARE) b
FAR = 100.0  # where the cubic formula would lose digits and its root is nearly its argument


class Affine(CoefficientStep):
    r"""A scale and a shift of every coordinate.

    .. math:: y = a + e^{s} x, \qquad \log|\det| = \textstyle\sum_i s_i

    Args:
        dim: D, the number of coordinates.
        context: width C of the context; 0 for none.
        spread: standard deviation of the first coefficients; 0 starts at the identity.

    Example:
        >>> y, log_det = Affine(3, spread=0.0).push(torch.ones(5, 3))
        >>> y.shape, log_det.shape, bool((y == 1).all())
        (torch.Size([5, 3]), torch.Size([5]), True)
    """

    def __init__(self, dim: int, *, context: int = 0, spread: float = 0.01) -> None:
        super().__init__(dim, context)
        self.coefficients = Coefficients(2 * dim, context, spread)

    def _map(self, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, log_scale = numbers.chunk(2, -1)
        if inverse:
            return (x - shift) * (-log_scale).exp(), -log_scale.sum(-1).expand(x.shape[:-1])
        return shift + log_scale.exp() * x, log_scale.sum(-1).expand(x.shape[:-1])


class NonlinearSquared(CoefficientStep):
    r"""The non-linear squared step: a line with one bump, which can split a mode in two.

    .. math:: y = a + b x + \frac{c}{1 + (d x + g)^2}, \qquad
        |c| < \tfrac{8\sqrt3}{9} \tfrac{b}{d}

    b and d are exponentials and c is a hyperbolic tangent times 0.98 of its limit, so the
    derivative is between .02 b and 1.98 b for every value of the parameters. With
    :math:`u = dx + g`, :math:`r = (y - a)d/b + g` and :math:`k = cd/b` the inverse is the only
    real root of :math:`(u - r)(1 + u^2) + k = 0`. Its discriminant is expanded first, so that
    the sixth powers of r cancel on paper and not in floating point; two Newton steps then remove
    what rounding is left and carry the derivatives, right to the third order.

    Args:
        dim: D, the number of coordinates.
        context: width C of the context; 0 for none.
        spread: standard deviation of the first coefficients; 0 starts at the identity. The bumps'
            places g start from a standard normal either way.

    Example:
        >>> step = NonlinearSquared(2, spread=1.0).double()
        >>> x = torch.linspace(-30, 30, 100, dtype=torch.float64).reshape(50, 2)
        >>> bool(torch.isclose(step.inv(step(x)), x, atol=1e-10).all())
        True

    Reference:
        Ziegler and Rush, Latent normalizing flows for discrete sequences (2019), section 5.2.
    """

    def __init__(self, dim: int, *, context: int = 0, spread: float = 0.01) -> None:
        super().__init__(dim, context)
        self.coefficients = Coefficients(5 * dim, context, spread)
        with torch.no_grad():
            self.coefficients.bias[-dim:] = torch.randn(dim)

    def _map(self, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        a, log_b, log_d, raw, g = numbers.chunk(5, -1)
        k = SHARE * LARGEST * raw.tanh()
        if not inverse:
            u = log_d.exp() * x + g
            bump = 1 / (1 + u * u)
            y = a + log_b.exp() * x + (log_b - log_d).exp() * k * bump
            return y, (log_b + _slope(u, k).log()).sum(-1)
        r = (log_d - log_b).exp() * (x - a) + g
        u = _root(r.detach(), k.detach())
        for _ in range(2):  # the first makes the first derivative right, the second the next two
            u = u - (u + k / (1 + u * u) - r) / _slope(u, k)
        return (u - g) * (-log_d).exp(), -(log_b + _slope(u, k).log()).sum(-1)


def _slope(u: Tensor, k: Tensor) -> Tensor:
    """Return the derivative of u + k / (1 + u^2)."""
    bump = 1 / (1 + u * u)
    return 1 - 2 * k * (u * bump) * bump


@torch.no_grad()
def _root(r: Tensor, k: Tensor) -> Tensor:
    """Solve u + k / (1 + u^2) = r for the only real u, by the cubic formula."""
    r, k = torch.broadcast_tensors(r, k)  # type: ignore[no-untyped-call]
    near = r.abs() <= FAR
    s = torch.where(near, r, 0.0)
    square = s * s
    p = 1 - square / 3
    half = s * (square + 9) / 27 - k / 2  # minus half the constant of the depressed cubic
    discriminant = ((square + 1) ** 2 - k * s * (square + 9)) / 27 + k * k / 4
    size = (half.abs() + discriminant.relu().sqrt()) ** (1 / 3)
    t = torch.copysign(size, half)  # of the two cube roots, the one without cancellation
    u = t - p / (3 * t) + s / 3
    return torch.where(near, u, r - k / (1 + r * r))


class Spline(CoefficientStep):
    r"""A monotone rational-quadratic spline on every coordinate, the identity outside a box.

    Inside [-bound, bound] each coordinate has its own bins; at the box's edges the derivative
    is 1, so the map is continuously differentiable everywhere.

    Args:
        dim: D, the number of coordinates.
        context: width C of the context; 0 for none.
        bins: K, the number of bins.
        bound: half the box's width, in the units of the points.
        spread: standard deviation of the first coefficients; 0 starts at the identity.

    Raises:
        ValueError: if there is no box, or it has too many bins.

    Example:
        >>> step = Spline(1, bins=4, bound=2.0, spread=1.0)
        >>> x = torch.tensor([[-3.0], [-2.0], [2.0], [5.0]])
        >>> torch.equal(step(x), x)  # the ends of the box and what lies outside
        True

    Reference:
        Durkan et al., Neural spline flows (2019), section 3.1.
    """

    def __init__(
        self,
        dim: int,
        *,
        context: int = 0,
        bins: int = 8,
        bound: float = 4.0,
        spread: float = 0.01,
    ) -> None:
        super().__init__(dim, context)
        check_spline(type(self).__name__, bins, bound)
        self.bins, self.bound = bins, bound
        self.coefficients = Coefficients(dim * size_of_spline(bins), context, spread)

    def _map(self, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raw = numbers.reshape(*numbers.shape[:-1], self.dim, -1)
        out, log_slope = spline(x, raw, self.bound, inverse=inverse)
        return out, log_slope.sum(-1)


def check_spline(where: str, bins: int, bound: float) -> None:
    """Refuse a spline without bins or without a box."""
    if not 1 <= bins <= 0.5 / MINIMUM:
        raise ValueError(f"{where}: bins is {bins}; give 1 to {int(0.5 / MINIMUM)}.")
    if not 0 < bound < math.inf:
        raise ValueError(f"{where}: bound is {bound}; give half the width of a box, above 0.")
