"""Data of which a few rows have labels: choosing those rows, and batches that all hold some."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ["keep_labels", "labelled_batches"]


def keep_labels(labels: Tensor, count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Keep the labels of a few rows, equally many of each class, and mark the others as missing.

    Args:
        labels: class numbers; -1 where a label is missing already.  # (N,)
        count: how many to keep, a multiple of the number of classes.
        generator: where the choice comes from; torch's own by default.

    Returns:
        The labels kept, -1 elsewhere.  # (N,)

    Raises:
        ValueError: the count cannot be shared out equally, or a class has too few rows.

    Example:
        >>> kept = keep_labels(torch.tensor([0, 1, 0, 1, 1, 0]), 4)
        >>> [int((kept == c).sum()) for c in (0, 1, -1)]
        [2, 2, 2]
    """
    classes = torch.unique(labels[labels >= 0])
    if not len(classes) or count < 1 or count % len(classes):
        raise ValueError(
            f"keep_labels: {count} labels of {len(classes)} classes; take a multiple of the "
            "number of classes."
        )
    each = count // len(classes)
    kept = torch.full_like(labels, -1)
    for number in classes.tolist():
        rows = (labels == number).nonzero()[:, 0]
        if len(rows) < each:
            raise ValueError(
                f"keep_labels: class {number} has {len(rows)} rows and {each} are wanted; keep "
                "fewer labels."
            )
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        kept[rows[order[:each]]] = number
    return kept


class _Rows(Dataset[tuple[Tensor, ...]]):
    """Tensors whose rows are taken many at a time."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.index_select(0, rows.to(part.device)) for part in self.tensors)


class _Mixed(Sampler[Tensor]):
    """Yield row numbers: all unlabelled rows once an epoch, with some labelled ones in each batch.

    Args:
        labels: class numbers, -1 where missing.  # (N,)
        free: unlabelled rows of a batch at most.
        fixed: labelled rows of every batch.
    """

    def __init__(self, labels: Tensor, free: int, fixed: int) -> None:
        self.unlabelled = (labels < 0).nonzero()[:, 0].cpu()
        self.labelled = (labels >= 0).nonzero()[:, 0].cpu()
        self.free, self.fixed = free, fixed

    def __len__(self) -> int:
        return -(-len(self.unlabelled) // self.free)

    def __iter__(self) -> Iterator[Tensor]:
        order = self.unlabelled[torch.randperm(len(self.unlabelled))]
        # One permutation after another: within an epoch the counts of two rows differ by one.
        wanted = len(self) * self.fixed
        rounds = [
            self.labelled[torch.randperm(len(self.labelled))]
            for _ in range(-(-wanted // len(self.labelled)))
        ]
        labelled = torch.cat(rounds)[:wanted].reshape(len(self), self.fixed)
        # Parts of equal size but for one row, so that no row weighs much more than another.
        for part, known in zip(torch.tensor_split(order, len(self)), labelled, strict=True):
            yield torch.cat([known, part])


def labelled_batches(
    x: Tensor, y: Tensor, *, batch_size: int, labelled_per_batch: int
) -> DataLoader[Any]:
    """Return batches (x, y) for a fit, each with the same number of labelled rows.

    An epoch goes once through the rows without a label, shuffled, and joins labelled rows to each
    batch, going through those in one shuffled order after another. Orders come from torch's
    global generator, so that a fit resumes within an epoch as it does for tensors.

    Args:
        x: data.  # (N, ...)
        y: class numbers, -1 where a label is missing.  # (N,)
        batch_size: rows of a batch, labelled ones included.
        labelled_per_batch: how many of them have labels.

    Returns:
        A loader that :func:`pyroboost.infer.fit` takes as data.

    Raises:
        ValueError: there are no rows of one of the two kinds, or sizes do not fit.

    Example:
        >>> y = torch.full((10,), -1)
        >>> y[:2] = torch.tensor([0, 1])
        >>> batches = labelled_batches(torch.randn(10, 3), y, batch_size=5, labelled_per_batch=1)
        >>> [(tuple(x.shape), int((y >= 0).sum())) for x, y in batches]
        [((5, 3), 1), ((5, 3), 1)]

    Reference:
        Cascaded meta-models, supplement C: a weighted sum of means over either kind of data.
    """
    if len(x) != len(y) or y.dim() != 1 or y.is_floating_point():
        raise ValueError(
            f"labelled_batches: x of shape {tuple(x.shape)} and labels of shape {tuple(y.shape)}, "
            f"{y.dtype}; pass one class number per row."
        )
    known = int((y >= 0).sum())
    if not 0 < known < len(y):
        raise ValueError(
            f"labelled_batches: {known} of {len(y)} rows have labels; where all or none have, "
            "pass the tensors themselves."
        )
    if not 0 < labelled_per_batch < batch_size:
        raise ValueError(
            f"labelled_batches: {labelled_per_batch} labelled rows in batches of {batch_size}; "
            "leave room for both kinds."
        )
    rows = _Mixed(y, batch_size - labelled_per_batch, labelled_per_batch)
    return DataLoader(_Rows(x, y), sampler=rows, batch_size=None)
