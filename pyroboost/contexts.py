"""Contexts that leave the process as they found it: modes, random state, parameter handling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from torch import nn

__all__ = ["evaluating", "forked_rng", "local_params", "service"]


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules in eval mode and give every submodule its own mode back afterwards.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
        >>> with evaluating(net):
        ...     print(net[0].training)
        False
        >>> net[0].training, net[1].training
        (True, False)
    """
    modes = [(child, child.training) for module in modules for child in module.modules()]
    try:
        for child, _ in modes:
            child.training = False
        yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Give torch's random state back afterwards, on the CPU and on every CUDA device in use.

    Args:
        seed: seed within the context; ``None`` goes on from the present state.
    """
    with torch.random.fork_rng(enabled=True):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def local_params() -> Iterator[None]:
    """Let modules keep their own parameters, out of Pyro's global param store."""
    if pyro.settings.get("module_local_params"):
        yield
        return
    with pyro.settings.context(module_local_params=True):
        yield


@contextmanager
def service(*modules: nn.Module) -> Iterator[None]:
    """Run programs for a number, not for training: no gradients, eval mode, nobody listening."""
    with torch.no_grad(), evaluating(*modules), local_params(), pyro.poutine.block():
        yield
