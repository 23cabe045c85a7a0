"""The state of every global random generator as plain data: kept, set, isolated."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch

from pyroboost.contexts import stream_seed

__all__ = ["get_rng_state", "isolated_rng", "set_rng_state"]


def get_rng_state(device: torch.device) -> dict[str, Any]:
    """Return the random state of torch (CPU and ``device``), Python and NumPy as plain data.

    ``pyro.util.get_rng_state`` holds NumPy arrays, which a safe ``torch.load`` refuses; here are
    only tensors, lists and numbers.
    """
    state = pyro.util.get_rng_state()
    version, words, gauss = state["random"]
    name, keys, *rest = state["numpy"]
    plain = {
        "torch": state["torch"],
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
    }
    if device.type == "cuda":
        plain["device"] = torch.cuda.get_rng_state(device)
    elif device.type != "cpu":
        plain["device"] = torch.get_device_module(device).get_rng_state()
    return plain


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Set what :func:`get_rng_state` returned, in this process or in another."""
    version, words, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    pyro.util.set_rng_state(
        {
            "torch": state["torch"],
            "random": (version, tuple(words.tolist()), gauss),
            "numpy": (name, keys.numpy().astype(np.uint32), *rest),
        }
    )
    if "device" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
    elif "device" in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])


def _seed_all(seed: int, device: torch.device) -> None:
    seed = stream_seed(seed)
    # torch.manual_seed would seed every accelerator, also those that nobody restores.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (the global generator is what is meant)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@contextmanager
def isolated_rng(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Give every global random generator its state back afterwards.

    Args:
        device: the accelerator whose generator counts too.
        seed: seed within the context; ``None`` goes on from the present state.

    Example:
        >>> before = torch.get_rng_state()
        >>> with isolated_rng(torch.device("cpu"), seed=1):
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    before = get_rng_state(device)
    try:
        if seed is not None:
            _seed_all(seed, device)
        yield
    finally:
        set_rng_state(before, device)
