"""Energies in the plane: log densities that lack their log Z, to be matched by a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["ENERGIES", "WALL", "energy_log_density"]

WALL = (4.0, 0.2)
"""Where the wall of the energies stands, and the width over which a density falls behind it."""


def _wave(a: Tensor) -> Tensor:
    return (torch.pi * a / 2).sin()


def _ring(z: Tensor) -> Tensor:
    a = z[..., 0]
    lobes = torch.logaddexp(-((a - 2) / 0.6).square() / 2, -((a + 2) / 0.6).square() / 2)
    # The length has no gradient at the origin, where autograd makes NaN of it.
    length = (z.square().sum(-1) + 1e-12).sqrt()
    return lobes - ((length - 2) / 0.4).square() / 2


def _band(z: Tensor) -> Tensor:
    a, b = z.unbind(-1)
    return -((b - _wave(a)) / 0.4).square() / 2


def _bent_pair(z: Tensor) -> Tensor:
    a, b = z.unbind(-1)
    bump = 3 * (-((a - 1) / 0.6).square() / 2).exp()
    near = -((b - _wave(a)) / 0.35).square() / 2
    return torch.logaddexp(near, -((b - _wave(a) + bump) / 0.35).square() / 2)


def _forked(z: Tensor) -> Tensor:
    a, b = z.unbind(-1)
    step = 3 * logsigmoid((a - 1) / 0.3).exp()
    near = -((b - _wave(a)) / 0.4).square() / 2
    return torch.logaddexp(near, -((b - _wave(a) + step) / 0.35).square() / 2)


ENERGIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "u1": _ring,
    "u2": _band,
    "u3": _bent_pair,
    "u4": _forked,
}
"""Minus the energies U1 to U4 without their wall, by name."""


def energy_log_density(name: str) -> Callable[[Tensor], Tensor]:
    r"""Return the log density of an energy in nats, without its log Z.

    $$\log \tilde p(z) = -U(z) - \tfrac12 \sum_d \Big(\frac{\max(|z_d| - 4, 0)}{0.2}\Big)^2$$

    U2 to U4 do not depend on how far out the first coordinate is, so their densities have no
    finite integral. The second term is a wall: nothing within the square [-4, 4]^2, where the
    paper draws them, and half a normal of standard deviation 0.2 behind it. Its gradient leads
    back. All four have it; U1, whose density is below 1e-7 of its peak there, needs none. Sums
    of exponentials are taken as logarithms, so that gradients reach any distance.

    Args:
        name: ``"u1"``, a ring with two lobes; ``"u2"``, a wavy band; ``"u3"``, a band that parts
            and joins; ``"u4"``, a band that forks.

    Returns:
        A function from points (*S, 2) to log densities (*S).

    Raises:
        ValueError: there is no such energy.

    Example:
        >>> energy_log_density("u2")(torch.tensor([[0.0, 0.0], [0.0, 0.4]]))
        tensor([-0.0000, -0.5000])

    Reference:
        Rezende and Mohamed, Variational inference with normalizing flows (2015), Table 1.
    """
    if name not in ENERGIES:
        raise ValueError(
            f"energy_log_density: there is no energy {name!r}; take one of {', '.join(ENERGIES)}."
        )
    inner, (place, width) = ENERGIES[name], WALL

    def log_density(z: Tensor) -> Tensor:
        if z.shape[-1:] != (2,):
            raise ValueError(
                f"energy '{name}': points have shape {tuple(z.shape)}; their last dimension must "
                "be 2."
            )
        behind = (z.abs() - place).clamp_min(0.0) / width
        return inner(z) - behind.square().sum(-1) / 2

    return log_density
