"""Training parts that are iterated afresh each epoch: bits drawn anew, pictures read from files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["ImageBatches", "StochasticBits"]


class _Epochs:
    """Cut ``num_rows`` rows into batches, in an order drawn anew in each epoch."""

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        shuffle: bool,
        generator: torch.Generator | None,
    ) -> None:
        name = type(self).__name__
        if num_rows < 1:
            raise ValueError(f"{name}: there are no rows; pass at least one.")
        if batch_size < 1:
            raise ValueError(f"{name}: batch_size is {batch_size}; take 1 or more.")
        self.num_rows, self.batch_size = num_rows, batch_size
        self.shuffle, self.generator = shuffle, generator

    def __len__(self) -> int:
        """Batches in an epoch."""
        full = math.ceil(self.num_rows / self.batch_size)
        return full - 1 if self._joins_last_row else full

    @property
    def _joins_last_row(self) -> bool:
        # Batch normalisation cannot train on one row, so a lone last row joins the batch before.
        return self.num_rows > self.batch_size > 1 and self.num_rows % self.batch_size == 1

    def _orders(self) -> Iterator[Tensor]:
        if self.shuffle:
            order = torch.randperm(self.num_rows, generator=self.generator)
        else:
            order = torch.arange(self.num_rows)
        last = len(self) - 1
        for number in range(len(self)):
            start = number * self.batch_size
            yield order[start:] if number == last else order[start : start + self.batch_size]


class StochasticBits(_Epochs):
    r"""Batches of bits $x_{nd} \sim \mathrm{Bernoulli}(p_{nd})$, drawn anew in every epoch.

    Every ``iter()`` starts an epoch: a new order, then new bits batch by batch, both from torch's
    global generator unless another is given. The training loop's checkpoints cover the global
    generator only, so leave ``generator`` out where exact resuming matters. A lone last row joins
    the batch before it.

    Args:
        probabilities: grey levels in [0, 1].  # (N, D)
        batch_size: rows of a batch.
        shuffle: draw a new order each epoch.
        generator: where order and bits come from.

    Raises:
        ValueError: a grey level outside [0, 1], no rows, or a batch size below 1.

    Example:
        >>> bits = StochasticBits(torch.full((10, 4), 0.5), batch_size=4)
        >>> [tuple(batch.shape) for batch in bits]
        [(4, 4), (4, 4), (2, 4)]
        >>> bool(((bits.draw() == 0) | (bits.draw() == 1)).any())
        True

    Reference:
        Salakhutdinov and Murray, "On the quantitative analysis of deep belief networks", 2008.
    """

    def __init__(
        self,
        probabilities: Tensor,
        batch_size: int = 100,
        *,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        low, high = (
            (float(v) for v in torch.aminmax(probabilities))
            if probabilities.numel()
            else (0.0, 0.0)
        )
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(
                f"StochasticBits: grey levels run from {low:g} to {high:g}; scale them into [0, 1]."
            )
        super().__init__(len(probabilities), batch_size, shuffle=shuffle, generator=generator)
        self.probabilities = probabilities

    def __repr__(self) -> str:
        rows, size = self.num_rows, self.probabilities[0].numel()
        return f"StochasticBits({rows} x {size}, batch_size={self.batch_size})"

    def __iter__(self) -> Iterator[Tensor]:
        for rows in self._orders():
            grey = self.probabilities.index_select(0, rows.to(self.probabilities.device))
            yield torch.bernoulli(grey, generator=self.generator)

    def draw(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Return one draw of all bits, in the order of the data.

        Args:
            generator: where the bits come from; by default where the batches' come from.

        Returns:
            The bits.  # (N, D)
        """
        return torch.bernoulli(self.probabilities, generator=generator or self.generator)


class ImageBatches(_Epochs):
    """Batches of pictures read from files when they are needed, again in every epoch.

    Args:
        paths: the files.
        read: turns one file into a tensor.  # (C, H, W)
        batch_size: pictures of a batch; a lone last one joins the batch before it.
        shuffle: draw a new order each epoch.
        generator: where the order comes from; torch's own by default.

    Raises:
        ValueError: no files, or a batch size below 1.

    Example:
        >>> pictures = ImageBatches([Path("a"), Path("b")], lambda path: torch.zeros(3, 4, 4))
        >>> [tuple(batch.shape) for batch in pictures]
        [(2, 3, 4, 4)]
    """

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[Path], Tensor],
        batch_size: int = 100,
        *,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(len(paths), batch_size, shuffle=shuffle, generator=generator)
        self.paths, self.read = tuple(paths), read

    def __repr__(self) -> str:
        return f"ImageBatches({self.num_rows} files, batch_size={self.batch_size})"

    def __iter__(self) -> Iterator[Tensor]:
        for rows in self._orders():
            yield torch.stack([self.read(self.paths[row]) for row in rows.tolist()])
