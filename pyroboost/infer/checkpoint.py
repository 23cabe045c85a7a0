"""Snapshots of weights in memory and one atomic checkpoint file of plain data."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyroboost.infer.errors import CheckpointError

__all__ = ["check_settings", "describe", "read", "restore", "snapshot", "write"]

FORMAT = 1


def _copied(value: Any, memo: dict[Any, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # A network that model and guide share is named twice and copied once.
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if key not in memo or not value.numel():
            memo[key] = value.detach().clone()
        return memo[key]
    if isinstance(value, Mapping):
        return {name: _copied(item, memo) for name, item in value.items()}
    return value


def snapshot(pair: nn.Module) -> dict[str, Any]:
    """Copy the complete state of a pair: parameters, buffers and free params, unconstrained."""
    state: dict[str, Any] = _copied(pair.state_dict(), {})
    return state


def restore(pair: nn.Module, state: dict[str, Any]) -> None:
    """Put a snapshot back, bit for bit, into the same tensors."""
    pair.load_state_dict(state)


def describe(value: Any) -> Any:
    """Return a setting as plain data that is the same in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, functools.partial):
        words = {name: describe(item) for name, item in sorted(value.keywords.items())}
        return [describe(value.func), describe(value.args), words]
    if isinstance(value, Tensor):
        return value.tolist()
    return getattr(value, "__qualname__", type(value).__qualname__)


def check_settings(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a checkpoint that other settings wrote, naming the first that differs."""
    for name in sorted(saved.keys() | now.keys()):
        before, after = saved.get(name), now.get(name)
        if before != after:
            raise CheckpointError(
                f"fit: checkpoint {path} was written with {name} = {before} and this fit has "
                f"{after}; call fit as before, name another file or pass resume=False."
            )


def _plain(value: Any, where: str) -> Any:
    """Return a value with its mappings as dicts, refusing what a safe load would not read."""
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value.detach() if isinstance(value, Tensor) else value
    if isinstance(value, Mapping):
        return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, where) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()  # a NumPy number
    raise CheckpointError(
        f"fit: {where} is a {type(value).__name__}, which a checkpoint of tensors, lists and "
        "numbers cannot hold; choose another optimizer or scheduler, or leave checkpoint out."
    )


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old file or the new one."""
    content = _plain({"format": FORMAT, **content}, "checkpoint")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    if hasattr(os, "O_DIRECTORY"):  # the new name itself must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint safely; nothing in the file is run."""
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        known = content["format"] == FORMAT
    except Exception as error:
        raise CheckpointError(
            f"fit: {path} is not a readable checkpoint of a fit; name another file or pass "
            "resume=False to overwrite it."
        ) from error
    if not known:
        raise CheckpointError(
            f"fit: {path} has checkpoint format {content['format']}, and this version reads "
            f"{FORMAT}; name another file or pass resume=False."
        )
    return content
