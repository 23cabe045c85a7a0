"""Data of any form as epochs of batches, each batch a tuple of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pyroboost.infer.weighting import weighted_rows

__all__ = ["Batches"]

Batch = tuple[Tensor, ...]


class Batches:
    """Epochs of batches from tensors, a ``DataLoader`` or any re-iterable.

    1. A tensor ``(N, ...)`` or a tuple of tensors of one N is cut into batches, in an order that
       torch's global generator draws anew each epoch when ``shuffle`` is on.
    2. A ``DataLoader`` is iterated afresh each epoch; its own generator counts as random state.
    3. Any other iterable (a list of batches, an object whose ``__iter__`` draws new bits) is
       iterated afresh each epoch. What can be iterated only once is refused.

    Args:
        data: the data; each batch is a tensor or a tuple or list of tensors of one length.
        batch_size: rows of a batch, for tensors only; a last batch of a single row joins the one
            before it, since batch normalisation cannot train on one row.
        device: where the batches go.
        shuffle: draw a new order each epoch, for tensors only.
        name: what messages call the data.
        transform: what makes of each batch the batch that is trained on, afresh each epoch.
        weights: a weight for each row of tensors; rows of weight 0 are left out and the others
            have a mean of 1. Each batch of an epoch then ends with its weights.  # (N,)

    Example:
        >>> batches = Batches(torch.zeros(10, 3), 4, torch.device("cpu"), shuffle=True)
        >>> [tuple(x.shape) for (x,) in batches.epoch()]
        [(4, 3), (4, 3), (2, 3)]
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        device: torch.device,
        *,
        shuffle: bool,
        name: str = "data",
        transform: Callable[..., Batch] | None = None,
        weights: Tensor | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"fit: batch_size is {batch_size}; take 1 or more.")
        self.device, self.shuffle, self.name = device, shuffle, name
        self.batch_size = batch_size
        self.transform = transform
        self.tensors: Batch | None = None
        self.data = data
        if isinstance(data, Tensor) or (
            isinstance(data, tuple) and data and all(isinstance(part, Tensor) for part in data)
        ):
            self.tensors = (data,) if isinstance(data, Tensor) else data
            self._check_tensors(self.tensors)
            if weights is not None:
                called = "weights" if name == "data" else f"{name}_weights"
                self.tensors, weights = weighted_rows(self.tensors, weights, called)
                self.tensors = (*self.tensors, weights)
            self._cuts = self._cut(len(self.tensors[0]))
        else:
            self._check_iterable(data)
            if weights is not None:
                raise TypeError(
                    f"fit: {self.name} came as {type(data).__name__} with weights, whose rows "
                    "cannot be told apart; pass the data as tensors."
                )
        self.weighted = weights is not None

    def _check_tensors(self, tensors: Batch) -> None:
        sizes = [part.shape[0] if part.dim() else None for part in tensors]
        if not sizes[0] or any(size != sizes[0] for size in sizes):
            raise ValueError(
                f"fit: the tensors of {self.name} have {sizes} rows; pass tensors of one length "
                "of at least 1 along their first dimension."
            )
        for place, part in enumerate(tensors):
            if part.is_floating_point() and not _all_finite(part):
                raise ValueError(
                    f"fit: tensor {place} of {self.name} holds NaN or infinity; remove or impute "
                    "those values first."
                )

    def _check_iterable(self, data: Any) -> None:
        if not hasattr(data, "__iter__"):
            raise TypeError(
                f"fit: {self.name} is of type {type(data).__name__}; pass a tensor, a tuple of "
                "tensors, a DataLoader or an iterable of batches."
            )
        if hasattr(data, "__next__"):
            raise TypeError(
                f"fit: {self.name} is a {type(data).__name__}, which can be iterated only once; "
                "pass a list of batches or an object whose __iter__ starts a new epoch."
            )

    @property
    def resumes_within_epoch(self) -> bool:
        """Whether batch b of an epoch can be reached again from the state at its start."""
        if isinstance(self.data, DataLoader):
            return not isinstance(self.data.dataset, IterableDataset)
        return self.tensors is not None

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch, where that is known beforehand."""
        if self.tensors is not None:
            return len(self._cuts)
        if isinstance(self.data, DataLoader) and not self.resumes_within_epoch:
            return None  # the length of an IterableDataset is a promise, not a count
        return len(self.data) if isinstance(self.data, Sized) else None

    def _cut(self, size: int) -> list[tuple[int, int]]:
        step = self.batch_size
        cuts = [(start, min(start + step, size)) for start in range(0, size, step)]
        if len(cuts) > 1 and step > 1 and cuts[-1][1] - cuts[-1][0] == 1:
            cuts[-2:] = [(cuts[-2][0], size)]
        return cuts

    def epoch(self) -> Iterator[Batch]:
        """Yield the batches of a new epoch on the device."""
        for batch in self._raw_epoch():
            yield self._transformed(batch)

    def _transformed(self, batch: Batch) -> Batch:
        rows, weights = self.split(batch)
        if self.transform is not None:
            rows = self.transform(*rows)
        return rows if weights is None else (*rows, weights)

    def split(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        """Return a batch of an epoch without its weights, and them where there are any."""
        return (batch[:-1], batch[-1]) if self.weighted else (batch, None)

    def _raw_epoch(self) -> Iterator[Batch]:
        if self.tensors is None:
            for number, item in enumerate(self.data, 1):
                yield self._batch(item, number)
            return
        order = torch.randperm(len(self.tensors[0])) if self.shuffle else None
        orders = {part.device: order.to(part.device) for part in self.tensors if order is not None}
        for start, stop in self._cuts:
            rows = (
                part[start:stop]
                if order is None
                else part.index_select(0, orders[part.device][start:stop])
                for part in self.tensors
            )
            yield tuple(row.to(self.device, non_blocking=True) for row in rows)

    def _batch(self, item: Any, number: int) -> Batch:
        parts = tuple(item) if isinstance(item, tuple | list) else (item,)
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            kinds = [type(part).__name__ for part in parts]
            raise TypeError(
                f"fit: batch {number} of {self.name} holds {kinds}; yield a tensor or a tuple of "
                "tensors."
            )
        if not parts[0].dim() or not len(parts[0]):
            raise ValueError(
                f"fit: batch {number} of {self.name} has shape {tuple(parts[0].shape)}; yield "
                "at least one row along the first dimension."
            )
        return tuple(part.to(self.device, non_blocking=True) for part in parts)

    def peek(self) -> Batch:
        """Return a batch for a trial run; a tensor's first rows, else the first of a new pass."""
        if self.tensors is not None:
            batch = tuple(part[: self.batch_size].to(self.device) for part in self.tensors)
            return self.split(self._transformed(batch))[0]
        kept = self.generator_states()
        first = next(self.epoch(), None)
        self.set_generator_states(kept)
        if first is None:
            raise ValueError(f"fit: {self.name} gave no batch; pass at least one.")
        return first

    def _generators(self) -> list[torch.Generator]:
        if not isinstance(self.data, DataLoader):
            return []
        sampler = getattr(self.data, "sampler", None)
        inner = getattr(getattr(self.data, "batch_sampler", None), "sampler", None)
        found = [getattr(part, "generator", None) for part in (self.data, sampler, inner)]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def generator_states(self) -> list[Tensor]:
        """Return the states of the generators that a ``DataLoader`` owns."""
        return [generator.get_state() for generator in self._generators()]

    def set_generator_states(self, states: list[Tensor]) -> None:
        """Set what :meth:`generator_states` returned."""
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)

    def describe(self) -> list[Any]:
        """Return what tells one data set from another, as plain data for a checkpoint."""
        if self.tensors is None:
            return [
                type(self.data).__name__,
                self.num_batches,
                getattr(self.data, "batch_size", None),
            ]
        digest = hashlib.sha256()
        for part in self.tensors:
            rows = torch.linspace(0, len(part) - 1, min(len(part), 16)).long().to(part.device)
            sample = part.index_select(0, rows).detach().cpu().contiguous()
            digest.update(repr((tuple(part.shape), str(part.dtype))).encode())
            digest.update(sample.flatten().view(torch.uint8).numpy().tobytes())
        return [*(list(part.shape) for part in self.tensors), digest.hexdigest()[:16]]


def _all_finite(values: Tensor) -> bool:
    """Tell whether all values are finite, by their sum where that settles it in one pass."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
