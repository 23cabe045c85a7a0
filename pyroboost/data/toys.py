"""Toy problems in the plane: samples of known densities, and energies to be matched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyroboost.contexts import stream_seed
from pyroboost.data._toy_laws import Blades, Board, Bumps, Curves, Law, Rings
from pyroboost.data.dataset import Dataset

__all__ = ["TOYS", "Toy", "toy"]


@dataclass(frozen=True)
class Toy:
    """A density in the plane that can be drawn and scored.

    Args:
        name: what it is called.
        words: what it looks like.
        law: how it is drawn and scored.

    Example:
        >>> rings = TOYS["rings"]
        >>> x = rings.sample(5, seed=0)
        >>> x.shape, rings.log_prob(x).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    name: str
    words: str
    law: Law = field(repr=False)

    def sample(self, count: int, *, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Draw points by a stream of their own; the global generators are not touched.

        Args:
            count: N.
            seed: of the draws.
            dtype: of the points; torch's default where left out.

        Returns:
            Points.  # (N, 2)

        Raises:
            ValueError: the count is below 1.
        """
        if count < 1:
            raise ValueError(f"Toy.sample: count is {count}; draw one point or more.")
        generator = torch.Generator().manual_seed(stream_seed(seed))
        drawn = self.law.draw(count, generator)
        return drawn.to(torch.get_default_dtype() if dtype is None else dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the true log density of points in nats, minus infinity where there is none.

        Args:
            x: points.  # (*S, 2)

        Returns:
            Log densities.  # (*S)

        Raises:
            ValueError: the points are not of the plane, or hold NaN.
        """
        if x.shape[-1:] != (2,):
            raise ValueError(
                f"Toy.log_prob ('{self.name}'): points have shape {tuple(x.shape)}; their last "
                "dimension must be 2."
            )
        if bool(x.isnan().any()):
            raise ValueError(f"Toy.log_prob ('{self.name}'): some points are NaN; remove them.")
        flat = x.reshape(-1, 2).double().cpu()
        return self.law.log_prob(flat).reshape(x.shape[:-1]).to(x)


def _circle(count: int, radius: float) -> tuple[tuple[float, float], ...]:
    angles = [2 * math.pi * k / count for k in range(count)]
    return tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles)


def _upper_moon(t: Tensor) -> Tensor:
    return torch.stack([2 * t.cos() - 1.0, 2 * t.sin() - 0.5], -1)


def _lower_moon(t: Tensor) -> Tensor:
    return torch.stack([1.0 - 2 * t.cos(), 0.5 - 2 * t.sin()], -1)


def _spiral(t: Tensor) -> Tensor:
    return torch.stack([-t.cos() * t, t.sin() * t], -1) / 3


def _other_spiral(t: Tensor) -> Tensor:
    return -_spiral(t)


def _roll(t: Tensor) -> Tensor:
    return torch.stack([t.cos() * t, t.sin() * t], -1) / 5


def _wave(t: Tensor) -> Tensor:
    return torch.stack([t, 2 * (1.5 * t).cos()], -1)


_PI = math.pi
TOYS: Mapping[str, Toy] = {
    one.name: one
    for one in (
        Toy("two_gaussians", "two round normals apart", Bumps(((-2.0, 0.0), (2.0, 0.0)), 0.5)),
        Toy("eight_gaussians", "eight round normals on a circle", Bumps(_circle(8, 2.8), 0.35)),
        Toy("circles", "two circles with noise", Rings((1.5, 3.0), 0.24)),
        Toy("rings", "four circles with noise", Rings((0.75, 1.5, 2.25, 3.0), 0.16)),
        Toy(
            "moons", "two half circles with noise", Curves((_upper_moon, _lower_moon), 0, _PI, 0.2)
        ),
        Toy("pinwheel", "five twisted blades", Blades(5, 2.0, 0.6, 0.2, 0.9)),
        Toy(
            "two_spirals",
            "two spirals of one and a half turns with noise",
            Curves((_spiral, _other_spiral), 0.0, 3 * _PI, 0.15, rising=True),
        ),
        Toy("swiss_roll", "one spiral with noise", Curves((_roll,), 1.5 * _PI, 4.5 * _PI, 0.2)),
        Toy("checkerboard", "eight squares of a board", Board(4, 2.0)),
        Toy("cosine", "a wave with noise", Curves((_wave,), -3.5, 3.5, 0.25)),
    )
}
"""The toy densities by name."""


def toy(
    name: str, *, train: int = 5000, validation: int = 2000, test: int = 5000, seed: int = 0
) -> Dataset:
    """Draw a data set of points in the plane, whose true density is ``TOYS[name].log_prob``.

    Args:
        name: one of ``TOYS``: ``"eight_gaussians"``, ``"rings"``, ``"moons"``, ``"pinwheel"``,
            ``"two_spirals"``, ``"checkerboard"``, ...
        train: number of training points.
        validation: number of points for choices.
        test: number of points for final numbers.
        seed: of the draws.

    Returns:
        The data set; one draw, cut into its parts.

    Raises:
        ValueError: there is no density of that name, or a part is empty.

    Example:
        >>> toy("moons", train=100, validation=50, test=50)
        Dataset(moons: 100 train, 50 validation, 50 test; 2; two half circles with noise, seed 0)

    Reference:
        Giaquinto and Banerjee, Gradient boosted flows (2020), section 5.1 and Figure 4.
    """
    if name not in TOYS:
        raise ValueError(f"toy: there is no density {name!r}; take one of {', '.join(TOYS)}.")
    sizes = (train, validation, test)
    if min(sizes) < 1:
        raise ValueError(f"toy: the parts have {sizes} points; take one or more in each.")
    points = TOYS[name].sample(sum(sizes), seed=seed)
    first, second, third = torch.split(points, list(sizes))
    notes = f"{TOYS[name].words}, seed {seed}"
    return Dataset(name, first, second, third, image_shape=(2,), notes=notes)
