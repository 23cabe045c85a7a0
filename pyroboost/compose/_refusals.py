"""What a mixture cannot take, in words: data of other dtypes, weights, numbers of no component."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyroboost.compose._members import label
from pyroboost.metamodel import MetaModel
from pyroboost.program import first_tensor

__all__ = ["checked_components", "checked_weights", "explained"]

_BY_VALIDATION = ("Expected parameter ", "Expected value argument ")


@contextmanager
def explained(parts: Sequence[MetaModel], x: Tensor) -> Iterator[None]:
    """Say in one sentence what torch says of data that the parts cannot take.

    Only what has failed is looked into: parts may convert data, or make up for missing values.

    Args:
        parts: meta-models, which run within.
        x: their data.  # (N, ...)
    """
    try:
        yield
    except RuntimeError as error:
        words = _dtypes(parts, x) if "dtype" in str(error) else None
        if words is None:
            raise
        raise TypeError(words) from error
    except ValueError as error:
        bad = _non_finite(x) if str(error).startswith(_BY_VALIDATION) else 0
        if not bad:
            raise
        raise ValueError(
            f"Mixture: {bad} of {len(x)} data hold NaN or infinity, which the parts cannot score; "
            "remove or impute those values first."
        ) from error


def _dtypes(parts: Sequence[MetaModel], x: Tensor) -> str | None:
    tensors = [first_tensor(part) for part in parts]
    found = {i: t.dtype for i, t in enumerate(tensors) if t is not None and t.is_floating_point()}
    if not found:
        return None
    (first, dtype), *others = found.items()
    for index, other in others:
        if other != dtype:
            return (
                f"Mixture: {label(first, parts[first])} has parameters of {dtype} and "
                f"{label(index, parts[index])} of {other}; bring the mixture to one dtype by "
                "mixture.float() or mixture.double()."
            )
    if x.dtype == dtype:
        return None
    short = {torch.float32: "x.float()", torch.float64: "x.double()"}
    return (
        f"Mixture: the data are of {x.dtype} and the parameters of the parts of {dtype}; pass "
        f"{short.get(dtype, f'x.to({dtype})')}."
    )


def _non_finite(x: Tensor) -> int:
    return (
        int((~x.isfinite()).flatten(1).any(1).sum()) if x.dim() > 1 else int((~x.isfinite()).sum())
    )


def checked_weights(value: Any, num_parts: int) -> Tensor:
    """Return the weights of a mixture in double precision, or refuse them.

    Args:
        value: one number per part.  # (K,)
        num_parts: the number of parts K.
    """
    try:
        given = torch.as_tensor(value).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"Mixture: weights={value!r} came for {num_parts} parts; give a sequence or a tensor "
            "of one number each."
        ) from error
    total = float(given.sum()) if given.numel() else 0.0
    if given.shape != (num_parts,) or not abs(total - 1.0) < 1e-4 or bool((given < 0).any()):
        raise ValueError(
            f"Mixture: weights of shape {tuple(given.shape)} and sum {total:g} came for "
            f"{num_parts} parts; give one weight each, none below 0, summing to 1."
        )
    return given


def checked_components(h: Tensor, num_parts: int) -> Tensor:
    """Return numbers of components as an index, or refuse what is none.

    Args:
        h: whole numbers from 0, of any dtype.  # (N,)
        num_parts: the number of parts K.
    """
    wrong = ~((h >= 0) & (h < num_parts) & (h == h.round()))  # NaN is wrong as well
    if bool(wrong.any()):
        raise ValueError(
            f"Mixture: the hidden site is the component, and {h[wrong][0].item():g} came for one "
            f"of {num_parts} parts; pass whole numbers from 0 to {num_parts - 1}."
        )
    return h.long()
