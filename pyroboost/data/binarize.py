"""From grey levels in [0, 1] to bits: by a threshold, drawn once, or drawn anew each epoch."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from pyroboost.data.batches import StochasticBits
from pyroboost.data.dataset import Dataset

__all__ = ["Binarization", "binarize", "fixed_bits", "threshold_bits"]

Binarization = Literal["threshold", "stochastic", "raw"]
"""How grey levels become bits; ``"raw"`` keeps them."""


def threshold_bits(grey: Tensor, level: float = 0.5) -> Tensor:
    r"""Return the bits $x = [g > \text{level}]$.

    Args:
        grey: grey levels.  # (N, D)
        level: what a 1 must exceed.

    Returns:
        The bits, in the dtype of ``grey``.  # (N, D)

    Example:
        >>> threshold_bits(torch.tensor([0.2, 0.5, 0.7]))
        tensor([0., 0., 1.])
    """
    return (grey > level).to(grey.dtype)


def fixed_bits(grey: Tensor, seed: int) -> Tensor:
    r"""Return bits $x \sim \mathrm{Bernoulli}(g)$ that one seed fixes for good.

    They are drawn on the CPU by a generator of their own, so that they are the same on every
    device and move no other random stream.

    Args:
        grey: grey levels in [0, 1].  # (N, D)
        seed: what fixes the draw.

    Returns:
        The bits.  # (N, D)

    Example:
        >>> grey = torch.full((2, 50), 0.5)
        >>> bool((fixed_bits(grey, 1) == fixed_bits(grey, 1)).all())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.bernoulli(grey.cpu(), generator=generator).to(grey.device)


def binarize(grey: Dataset, how: Binarization, *, seed: int = 0, batch_size: int = 100) -> Dataset:
    """Return a data set of grey levels as one of bits.

    1. ``"threshold"``: 1 where the grey level exceeds one half.
    2. ``"stochastic"``: the training part becomes :class:`StochasticBits`, new bits in every
       epoch; validation and test bits are drawn once, from ``seed`` and ``seed + 1``.
    3. ``"raw"``: as it is.

    Args:
        grey: a data set whose parts are tensors in [0, 1].
        how: see above.
        seed: of the validation and test bits.
        batch_size: of stochastic training batches.

    Returns:
        The data set of bits.

    Raises:
        ValueError: ``how`` is another word.
        TypeError: a part is not a tensor.

    Example:
        >>> from pyroboost.data import digits
        >>> binarize(digits("raw"), "stochastic").train
        StochasticBits(1197 x 64, batch_size=100)
    """
    check_binarization(grey.name, how)
    if how == "raw":
        return grey
    train, validation, test = grey.train, grey.validation, grey.test
    if (
        not isinstance(train, Tensor)
        or not isinstance(test, Tensor)
        or not isinstance(validation, Tensor | None)
    ):
        raise TypeError(f"binarize: {grey.name} has parts that are not tensors; pass grey levels.")
    if how == "threshold":
        return replace(
            grey,
            train=threshold_bits(train),
            validation=None if validation is None else threshold_bits(validation),
            test=threshold_bits(test),
            notes=_joined("bits: grey > 1/2", grey.notes),
        )
    return replace(
        grey,
        train=StochasticBits(train, batch_size),
        validation=None if validation is None else fixed_bits(validation, seed),
        test=fixed_bits(test, seed + 1),
        notes=_joined(
            f"bits drawn anew each epoch, held-out bits by seeds {seed} and {seed + 1}", grey.notes
        ),
    )


def check_binarization(name: str, how: str, *more: str) -> None:
    """Refuse a word that is no binarisation.

    Args:
        name: the loader, for the message.
        how: the word.
        *more: words that this loader knows beside the common ones.

    Raises:
        ValueError: the word is unknown.
    """
    words = (*get_args(Binarization), *more)
    if how not in words:
        raise ValueError(f"{name}: binarization is {how!r}; take one of {', '.join(words)}.")


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
