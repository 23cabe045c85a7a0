"""Contexts that leave the process as they found it: modes, random state, parameter handling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from pyro.nn import PyroModule
from torch import nn

__all__ = ["evaluating", "forked_rng", "local_params", "pyro_modules", "service", "stream_seed"]


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


def stream_seed(seed: int) -> int:
    """Turn a user's seed into the seed of a stream that is ours alone.

    A user who makes data under ``torch.manual_seed(0)`` and then asks for ``seed=0`` would
    otherwise meet the very numbers that made the data again, as the noise of the guide.

    Example:
        >>> stream_seed(0) != 0, stream_seed(1) != stream_seed(0)
        (True, True)
    """
    mixed = (seed + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Give torch's random state back afterwards, on the CPU and on every CUDA device in use.

    Args:
        seed: seed within the context; ``None`` goes on from the present state.
    """
    live = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if live else ()
    with torch.random.fork_rng(devices=list(devices)):
        if seed is not None:
            torch.manual_seed(stream_seed(seed))
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
def pyro_modules(*modules: nn.Module) -> Iterator[None]:
    """Let every ``PyroModule`` keep its own parameters, whatever mode it was built in.

    With ``module_local_params`` a ``PyroModule`` replaces the param store while it is called,
    where it is not already being called: so that it is, from the outset.
    """
    parts = (part for module in modules for part in module.modules())
    contexts = {part._pyro_context for part in parts if isinstance(part, PyroModule)}
    for context in contexts:
        context.active += 1
        context.used = True
    try:
        yield
    finally:
        for context in contexts:
            context.active -= 1
            if not context.active:
                context.cache.clear()


@contextmanager
def service(*modules: nn.Module) -> Iterator[None]:
    """Run programs for a number, not for training: no gradients, eval mode, nobody listening."""
    with torch.no_grad(), evaluating(*modules), local_params(), pyro.poutine.block():
        yield
