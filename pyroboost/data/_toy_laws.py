"""Laws of points in the plane that can be drawn and whose density is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Blades", "Board", "Bumps", "Curves", "Law", "Rings"]

_NODES = 400
_ROWS = 4096


class Law:
    """A law of points in the plane."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw points, in double precision, (N, 2)."""
        raise NotImplementedError

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log densities in nats, (N), of points in double precision, (N, 2)."""
        raise NotImplementedError


def _normal(count: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _log_normal(x: Tensor, centres: Tensor, scale: float) -> Tensor:
    """Return log N(x; centre, scale^2 I) of all points and centres, (N, M)."""
    squares = (x[:, None] - centres).square().sum(-1)
    return -squares / (2 * scale**2) - math.log(2 * math.pi * scale**2)


@dataclass(frozen=True)
class Bumps(Law):
    """Equal round normals around given centres."""

    centres: tuple[tuple[float, float], ...]
    scale: float

    def _centres(self) -> Tensor:
        return torch.tensor(self.centres, dtype=torch.float64)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Choose a centre and add noise."""
        chosen = torch.randint(len(self.centres), (count,), generator=generator)
        return self._centres()[chosen] + _normal(count, generator, self.scale)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log of the mean of the normals."""
        found = _log_normal(x, self._centres(), self.scale)
        return found.logsumexp(-1) - math.log(len(self.centres))


@dataclass(frozen=True)
class Rings(Law):
    r"""Circles around the origin, blurred by round normal noise.

    $$p(x) = \frac1K \sum_k \frac{1}{2 \pi s^2}
    \exp\Big(-\frac{(|x| - r_k)^2}{2 s^2}\Big) e^{-z_k} I_0(z_k), \qquad z_k = |x| r_k / s^2$$
    """

    radii: tuple[float, ...]
    scale: float

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Choose a circle and an angle, and add noise."""
        chosen = torch.randint(len(self.radii), (count,), generator=generator)
        radius = torch.tensor(self.radii, dtype=torch.float64)[chosen]
        angle = 2 * math.pi * _uniform(count, generator)
        on = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
        return on + _normal(count, generator, self.scale)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density, with the Bessel function in place of the angle's integral."""
        radii = torch.tensor(self.radii, dtype=torch.float64)
        length, variance = x.norm(dim=-1, keepdim=True), self.scale**2
        bessel = torch.special.i0e(length * radii / variance).log()
        found = bessel - (length - radii).square() / (2 * variance)
        return found.logsumexp(-1) - math.log(2 * math.pi * variance * len(radii))


@dataclass(frozen=True)
class Curves(Law):
    r"""Curves c(t), blurred by round normal noise.

    $$p(x) = \frac1K \sum_k \int p(t)\, N(x; c_k(t), s^2 I)\, dt$$

    The integral is a sum over Gauss-Legendre nodes, which stand much closer than the noise is
    wide: what is left out is beyond double precision.

    Args:
        points: each a function from t (T) to points of a curve (T, 2).
        low: least t.
        high: largest t.
        rising: whether p(t) is proportional to t, from low = 0; else it is uniform.
        scale: s.
    """

    points: tuple[Callable[[Tensor], Tensor], ...]
    low: float
    high: float
    scale: float
    rising: bool = False

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Choose a curve and a place on it, and add noise."""
        chosen = torch.randint(len(self.points), (count,), generator=generator)
        u = _uniform(count, generator)
        t = self.low + (self.high - self.low) * (u.sqrt() if self.rising else u)
        places = torch.stack([point(t) for point in self.points])
        return places[chosen, torch.arange(count)] + _normal(count, generator, self.scale)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density by quadrature."""
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(_NODES))
        u = (nodes + 1) / 2  # the share of the way, on [0, 1], where weights / 2 sum to one
        density = 2 * u if self.rising else torch.ones_like(u)
        t = self.low + (self.high - self.low) * u
        centres = torch.cat([point(t) for point in self.points])
        log_weights = (density * weights / (2 * len(self.points))).log().repeat(len(self.points))
        blocks = [
            (_log_normal(rows, centres, self.scale) + log_weights).logsumexp(-1)
            for rows in torch.split(x, _ROWS)
        ]
        return torch.cat(blocks)


@dataclass(frozen=True)
class Blades(Law):
    r"""A pinwheel: stretched normals, turned by an angle that grows with the distance.

    A point y of $N((m, 0), \mathrm{diag}(a^2, b^2))$ is turned by $2 \pi k / K + c\,|y|$. Turning
    by an angle that depends on |y| alone preserves areas, so the density of x is the normal's at
    the point turned back.
    """

    count: int
    centre: float
    along: float
    across: float
    twist: float

    def _turned(self, x: Tensor, angle: Tensor) -> Tensor:
        cos, sin = angle.cos(), angle.sin()
        return torch.stack(
            [cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]], -1
        )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw from the normal, choose a blade, turn."""
        scales = torch.tensor([self.along, self.across], dtype=torch.float64)
        y = _normal(count, generator) * scales
        y[:, 0] += self.centre
        blade = torch.randint(self.count, (count,), generator=generator)
        return self._turned(y, 2 * math.pi * blade / self.count + self.twist * y.norm(dim=-1))

    def log_prob(self, x: Tensor) -> Tensor:
        """Turn back and score, for each blade."""
        blades = 2 * math.pi * torch.arange(self.count, dtype=torch.float64) / self.count
        back = -(blades + self.twist * x.norm(dim=-1, keepdim=True))
        y = self._turned(x[:, None], back)
        first = (y[..., 0] - self.centre) / self.along
        squares = first.square() + (y[..., 1] / self.across).square()
        constant = math.log(2 * math.pi * self.along * self.across * self.count)
        return (-squares / 2).logsumexp(-1) - constant


@dataclass(frozen=True)
class Board(Law):
    """The uniform law on the cells of one colour of a board of `cells` by `cells` cells."""

    cells: int
    side: float

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Choose a cell and a point in it."""
        column = torch.randint(self.cells, (count,), generator=generator)
        row = 2 * torch.randint(self.cells // 2, (count,), generator=generator) + column % 2
        inside = torch.stack([_uniform(count, generator), _uniform(count, generator)], -1)
        return self.side * (torch.stack([column, row], -1) + inside - self.cells / 2)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return minus the log of the area of the cells, or minus infinity beside them."""
        cell = (x / self.side + self.cells / 2).floor()
        on = (cell >= 0).all(-1) & (cell < self.cells).all(-1) & (cell.sum(-1) % 2 == 0)
        area = self.side**2 * self.cells**2 / 2
        outside = torch.full_like(x[:, 0], -math.inf)
        return torch.where(on, -math.log(area), outside)
