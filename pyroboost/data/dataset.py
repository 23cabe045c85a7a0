"""What every loader returns: named parts of a data set, and how they were made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyroboost.data.batches import ImageBatches, StochasticBits

__all__ = ["Dataset"]


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A training, a validation and a test part, with a note on how they were made.

    Small images are rows ``(N, D)``, read line by line from the top left, ink 1 and paper 0;
    CelebA keeps ``(N, 3, H, W)``.

    Args:
        name: what the data are called.
        train: a tensor, or batches that are drawn or read anew in every epoch.
        validation: the part for early stopping and choices; ``None`` where none was split off.
        test: the part for final numbers only.
        image_shape: height and width, with channels first where there are any.
        notes: which binarisation, which split, which seed.
        train_labels: class numbers from 0, where the source gives them.  # (N,) int64
        validation_labels: the same for ``validation``.
        test_labels: the same for ``test``.

    Example:
        >>> from pyroboost.data import tea
        >>> tea()
        Dataset(tea: 81 train, 81 validation, 81 test; 10 x 10; all 243 images, split by seed 0)
    """

    name: str
    train: Tensor | StochasticBits | ImageBatches
    validation: Tensor | ImageBatches | None
    test: Tensor | ImageBatches
    image_shape: tuple[int, ...]
    notes: str
    train_labels: Tensor | None = None
    validation_labels: Tensor | None = None
    test_labels: Tensor | None = None

    def __repr__(self) -> str:
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        sizes = ", ".join(
            f"{_rows(part)} {name}" for name, part in parts.items() if part is not None
        )
        shape = " x ".join(map(str, self.image_shape))
        return f"Dataset({self.name}: {sizes}; {shape}; {self.notes})"

    def train_tensor(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the training part as one tensor: itself, or one draw of all its bits.

        Args:
            generator: where the bits of a stochastic part come from; torch's own by default.

        Returns:
            The training rows.  # (N, D)

        Raises:
            TypeError: the part is read from files batch by batch and may not fit in memory.

        Example:
            >>> from pyroboost.data import tea
            >>> tea().train_tensor().shape
            torch.Size([81, 100])
        """
        if isinstance(self.train, Tensor):
            return self.train
        if isinstance(self.train, StochasticBits):
            return self.train.draw(generator=generator)
        raise TypeError(
            f"Dataset.train_tensor: the training part of {self.name} is read from files batch by "
            "batch; iterate over train instead."
        )


def _rows(part: Tensor | StochasticBits | ImageBatches) -> int:
    return part.shape[0] if isinstance(part, Tensor) else part.num_rows
