"""Settings and initial parameters of an RBM."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroboost.sampling.enumeration import MAX_UNITS

__all__ = ["check_settings", "initial_parameters"]


def check_settings(negative_phase: str, **sizes: int) -> None:
    """Refuse sizes below one and negative phases that cannot be had."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"RBM: {name} is {value}; it must be at least 1.")
    if negative_phase not in ("pcd", "cd", "exact"):
        raise ValueError(
            f"RBM: negative_phase is {negative_phase!r}; it must be 'pcd', 'cd' or 'exact'."
        )
    smaller = min(sizes["num_visible"], sizes["num_hidden"])
    if negative_phase == "exact" and smaller > MAX_UNITS:
        raise ValueError(
            f"RBM: the exact negative phase sums over the smaller layer, which has {smaller} "
            f"units; use 'pcd' above {MAX_UNITS}."
        )


def initial_parameters(
    num_visible: int,
    num_hidden: int,
    weight_scale: float,
    below: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return small random couplings, or copies of those below with the layers exchanged."""
    if below is None:
        weight = weight_scale * torch.randn(num_visible, num_hidden)
        return torch.zeros(num_visible), torch.zeros(num_hidden), weight
    visible_bias, hidden_bias, weight = (p.detach() for p in below)
    if weight.mT.shape != (num_visible, num_hidden):
        units = tuple(weight.shape)
        raise ValueError(
            f"RBM: start has {units[0]} visible and {units[1]} hidden units, so its exchange has "
            f"{units[1]} and {units[0]}, not {num_visible} and {num_hidden}; use "
            "RBM.transposed(below)."
        )
    # The copy keeps the memory order of the couplings, so that products round alike.
    return hidden_bias.clone(), visible_bias.clone(), weight.mT.clone()
