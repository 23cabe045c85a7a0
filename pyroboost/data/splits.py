"""Cutting data into a training, a validation and a test part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["seeded_split"]


def seeded_split(num: int, sizes: Sequence[int], seed: int, *, name: str) -> list[Tensor]:
    """Return row numbers of consecutive parts of one seeded order of ``num`` rows.

    The order comes from a generator of its own, so the split is the same whatever was drawn
    before, and draws nothing from torch's.

    Args:
        num: how many rows there are.
        sizes: rows of each part; they sum to ``num``.
        seed: of the order.
        name: the loader, for the message.

    Returns:
        One tensor of row numbers a part.

    Raises:
        ValueError: the sizes do not sum to the number of rows, or one is negative.

    Example:
        >>> [len(rows) for rows in seeded_split(10, (6, 2, 2), 0, name="example")]
        [6, 2, 2]
    """
    if sum(sizes) != num or min(sizes) < 0:
        raise ValueError(
            f"{name}: parts of {', '.join(map(str, sizes))} rows were asked of {num} rows; choose "
            "sizes that fit."
        )
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    return list(torch.split(order, list(sizes)))
