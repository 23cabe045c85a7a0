"""What a fit was asked for, where it stands, and the modes of the modules that it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Counters", "Settings", "training"]


@dataclass
class Settings:
    """What :func:`pyroboost.infer.fit` was asked for; its docstring explains each."""

    epochs: int
    optimizer: Callable[..., torch.optim.Optimizer]
    scheduler: Callable[..., Any] | None
    loss: Any
    annealing: float | Callable[[float], float] | None
    clip_norm: float | None
    max_skipped: int
    patience: int | None
    callbacks: Sequence[Any]
    checkpoint: Path | None
    checkpoint_every: int | None
    resume: bool
    seed: int | None
    progress: bool | None
    num_validation_particles: int


@dataclass
class Counters:
    """Where a fit stands: plain numbers, kept in the checkpoint."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches done in the running epoch
    loss_sum: float = 0.0
    num_data: int = 0
    epoch_seconds: float = 0.0
    annealed: bool = False
    skipped: int = 0  # batches left out, in all epochs
    waited: int = 0  # epochs since the best held-out bound
    best_epoch: int | None = None
    best_bound: float | None = None
    stopped: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def training(pair: nn.Module) -> Iterator[None]:
    """Put a pair in training mode, frozen parts excepted, and give all modes back afterwards.

    A part is frozen if it has parameters and none of them requires a gradient; its own mode says
    whether its batch-norm statistics move.
    """
    modes = [(module, module.training) for module in pair.modules()]

    def wake(module: nn.Module) -> None:
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            return
        module.training = True
        for child in module.children():
            wake(child)

    wake(pair)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
