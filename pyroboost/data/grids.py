"""Integrals over a square of the plane, by a grid: normalisers and divergences without noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Grid", "plane_grid"]

LogDensity = Callable[[Tensor], Tensor]
_ROWS = 20_000


class Grid(NamedTuple):
    """The midpoints of equal cells of a square.

    Args:
        points: midpoints, the second coordinate running fastest, (M, 2).
        log_cell: log area of a cell.
        steps: cells along a side, so that M = steps^2.
        bound: half the side.
    """

    points: Tensor
    log_cell: float
    steps: int
    bound: float

    def evaluate(self, log_density: LogDensity) -> Tensor:
        """Return log densities at all points without gradients, in double precision, (M)."""
        with torch.no_grad():
            blocks = [log_density(rows).double() for rows in torch.split(self.points, _ROWS)]
        return torch.cat(blocks)

    def log_integral(self, log_values: Tensor) -> float:
        r"""Return $\log \int \exp(f(z))\, dz$ over the square, by the midpoint rule.

        Args:
            log_values: f at the points.  # (M)
        """
        return float(log_values.double().logsumexp(0)) + self.log_cell

    def divergence(self, log_p: Tensor, log_q: Tensor) -> float:
        r"""Return the divergence KL(p || q) in nats over the square.

        $$\int p(z) \log \frac{p(z)}{q(z)}\, dz$$

        Neither is normalised here: subtract :meth:`log_integral` from what lacks its log Z.
        Where q has mass beyond the square, that mass is missing from KL(q || p).

        Args:
            log_p: log density of p at the points.  # (M)
            log_q: that of q.  # (M)

        Example:
            >>> grid = plane_grid(8.0, 200)
            >>> p = grid.evaluate(lambda z: -z.square().sum(-1) / 2 - math.log(2 * math.pi))
            >>> q = grid.evaluate(lambda z: -(z - 1).square().sum(-1) / 2 - math.log(2 * math.pi))
            >>> round(grid.divergence(p, q), 6), round(grid.log_integral(p), 6) + 0.0
            (1.0, 0.0)
        """
        log_p, log_q = log_p.double(), log_q.double()
        terms = log_p.exp() * (log_p - log_q)
        return float(torch.where(log_p == -math.inf, 0.0, terms).sum()) * math.exp(self.log_cell)


def plane_grid(bound: float = 6.0, steps: int = 400, *, dtype: torch.dtype | None = None) -> Grid:
    """Cut the square [-bound, bound]^2 into equal cells.

    Args:
        bound: half its side.
        steps: cells along a side.
        dtype: of the points; torch's default where left out.

    Raises:
        ValueError: the square or the number of cells is not positive.

    Example:
        >>> plane_grid(1.0, 2).points.tolist()
        [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]
    """
    if not (bound > 0 and math.isfinite(bound)) or steps < 1:
        raise ValueError(
            f"plane_grid: bound is {bound} and steps {steps}; take a positive bound and at least "
            "one step."
        )
    width = 2 * bound / steps
    axis = width * (torch.arange(steps, dtype=torch.float64) + 0.5) - bound
    points = torch.cartesian_prod(axis, axis)
    kept = points.to(torch.get_default_dtype() if dtype is None else dtype)
    return Grid(kept, 2 * math.log(width), steps, bound)
