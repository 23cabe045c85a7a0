"""Classes that are known for some data: their law, and what is no label."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

__all__ = ["EVERY", "Every", "Labelled", "Labels", "check_labels", "check_shape", "class_law"]


class Every:
    """In place of labels: each datum once with each class, in a leading dimension of C."""


EVERY = Every()
Labels = Tensor | Every | None


class Labelled(dist.Categorical):
    r"""A class per datum, known for some: $p(y)\, 1[y = \text{label}]$ where there is a label.

    The mass that a label leaves, $p(\text{label})$, is *not* scaled to one, so that a model's site
    scores $\log p(\text{label})$ on the rows with a label, whoever draws or enumerates it. Draws
    are the label itself there. With ``normalised=True``, as in a guide, that mass is one.

    Args:
        logits: log probabilities of the classes, up to a constant.  # (..., N, C)
        labels: class numbers, -1 where there is none.  # (..., N)
        normalised: whether a label's row has mass one.
    """

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        normalised: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        logits = logits.log_softmax(-1)
        known = labels >= 0
        index = labels.clamp(min=0)[..., None]
        logits, index = _together(logits, index)
        off = torch.full_like(logits, -math.inf).scatter(-1, index, 0.0)
        mass = torch.where(known, logits.gather(-1, index)[..., 0], 0.0)
        self.log_mass = torch.zeros_like(mass) if normalised else mass
        super().__init__(
            logits=torch.where(known[..., None], off, logits), validate_args=validate_args
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> Labelled:
        """Return the law with more leading dimensions."""
        new: Labelled = self._get_checked_instance(Labelled, self.__new__(type(self)))
        new.log_mass = self.log_mass.expand(batch_shape)
        super().expand(batch_shape, _instance=new)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(y) where y agrees with the label, if there is one; else minus infinity."""
        found: Tensor = super().log_prob(value)
        return found + self.log_mass


@register_kl(dist.Categorical, Labelled)  # type: ignore[no-untyped-call]
def _kl(q: dist.Categorical, p: Labelled) -> Tensor:
    bare = dist.Categorical(logits=p.logits, validate_args=False)
    mine = dist.Categorical(logits=q.logits, validate_args=False)
    own: Tensor = kl_divergence(mine, bare)
    return own - p.log_mass


def _together(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    logits, _ = torch.broadcast_tensors(logits, index)  # type: ignore[no-untyped-call]
    return logits, index.expand(*logits.shape[:-1], 1)


def class_law(logits: Tensor, labels: Labels, size: int, *, guide: bool) -> dist.Categorical:
    """Return the law of the class: a Categorical, cut to the labels where there are any.

    Args:
        logits: log probabilities up to a constant.  # (C,) or (..., N, C)
        labels: class numbers, -1 where missing; ``None``: all missing; ``EVERY``.  # (N,)
        size: number of data N.
        guide: whether the law stands in the guide.
    """
    count = logits.shape[-1]
    if isinstance(labels, Every):
        labels = torch.arange(count, device=logits.device)[:, None].expand(count, size)
    if labels is None:
        return dist.Categorical(logits=logits)
    return Labelled(logits, labels, normalised=guide)


def check_labels(labels: Labels, size: int, classes: int, name: str) -> None:
    """Refuse labels that are no class numbers, one per datum.

    Raises:
        TypeError: the labels are not integers.
        ValueError: another shape, or a number that is no class.
    """
    if labels is None or isinstance(labels, Every):
        return
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"M2: labels for '{name}' came as {type(labels).__name__}; pass an integer tensor (N,) "
            "with -1 where a label is missing, or None."
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"M2: labels for '{name}' are {labels.dtype}; pass class numbers as torch.int64, with "
            "-1 where a label is missing."
        )
    if tuple(labels.shape) != (size,):
        raise ValueError(
            f"M2: labels of shape {tuple(labels.shape)} came for '{name}' with {size} data; pass "
            f"class numbers of shape ({size},)."
        )
    if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"M2: labels for '{name}' run from {int(labels.min())} to {int(labels.max())}; take "
            f"0 to {classes - 1}, and -1 where a label is missing."
        )


def check_shape(x: Tensor, shape: tuple[int, ...], name: str) -> int:
    """Refuse data of another shape; return how many there are."""
    if x.dim() <= len(shape) or tuple(x.shape[x.dim() - len(shape) :]) != shape:
        raise ValueError(
            f"M2: data of shape {tuple(x.shape)} came for '{name}'; it takes "
            f"(N, {', '.join(map(str, shape))})."
        )
    return x.shape[-1 - len(shape)]
