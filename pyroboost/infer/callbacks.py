"""What a fit tells others while it runs: its state, the callback protocol, the progress bar."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pyroboost.metamodel import MetaModel

__all__ = ["Callback", "FitState"]


@dataclass
class FitState:
    """What a callback sees of a running fit.

    Args:
        pair: the meta-model in training.
        optimizer: its optimiser.
        epochs: epochs that were asked for.
        epoch: the running epoch, from 1.
        batch: batches done in this epoch.
        loss: the last batch's loss per datum, in nats.
        beta: weight of the latent terms.
        history: one plain dict an epoch.
        best_epoch: epoch of the best held-out bound so far.
        best_bound: that bound per datum, in nats.
    """

    pair: MetaModel
    optimizer: torch.optim.Optimizer
    epochs: int
    epoch: int = 0
    batch: int = 0
    loss: float = float("nan")
    beta: float = 1.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    best_bound: float | None = None
    stop_reason: str | None = None

    def stop(self, reason: str = "a callback asked to stop") -> None:
        """Ask the fit to end after this batch, with the epoch judged as it stands."""
        self.stop_reason = reason


class Callback:
    """Base of callbacks; each method may be left as it is.

    Methods run between steps, with random states of their own: drawing samples in a callback does
    not change the fit.

    Example:
        >>> class StopAt(Callback):
        ...     def on_epoch(self, state):
        ...         if state.history[-1]["loss"] < 1.0:
        ...             state.stop("low enough")
    """

    def on_start(self, state: FitState) -> None:
        """Run before the first step, also of a resumed fit."""

    def on_batch(self, state: FitState) -> None:
        """Run after each step."""

    def on_epoch(self, state: FitState) -> None:
        """Run after each epoch, when its row stands in the history."""

    def on_end(self, state: FitState) -> None:
        """Run at the end, with the final weights in place; not after an error."""


class _EpochFunction(Callback):
    def __init__(self, fn: Callable[[FitState], Any]) -> None:
        self.fn = fn

    def on_epoch(self, state: FitState) -> None:
        self.fn(state)


def as_callback(callback: Any) -> Any:
    """Return an object with the four methods; a plain function runs after each epoch."""
    if isinstance(callback, Callback):
        return callback
    if not callable(callback):
        raise TypeError(
            f"fit: a callback of type {type(callback).__name__} is neither a Callback nor a "
            "function of the state; subclass Callback."
        )
    return _EpochFunction(callback)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")


class Bar:
    """A ``tqdm.auto`` bar over all batches, or over epochs where batches cannot be counted.

    Args:
        show: ``None`` shows it in a terminal or a notebook and not in a log file.
        epochs: epochs of the fit.
        num_batches: batches of an epoch, or ``None``.
        done: epochs already done.
    """

    def __init__(
        self, show: bool | None, epochs: int, num_batches: int | None, done: int, part: int
    ) -> None:
        from tqdm.auto import tqdm

        if show is None:
            show = sys.stderr.isatty() or _in_notebook()
        unit = num_batches or 1
        self.by_batch = num_batches is not None
        self.tqdm = tqdm(
            total=epochs * unit,
            initial=done * unit + (part if self.by_batch else 0),
            disable=not show,
            unit="batch" if self.by_batch else "epoch",
            dynamic_ncols=True,
        )

    def batch(self) -> None:
        """Count a batch."""
        if self.by_batch:
            self.tqdm.update()

    def epoch(self, row: dict[str, Any]) -> None:
        """Count an epoch and show its row."""
        if not self.by_batch:
            self.tqdm.update()
        if not self.tqdm.disable:
            shown = {"epoch": row["epoch"], "loss": f"{row['loss']:.4g}"}
            if row["validation_bound"] is not None:
                shown["bound"] = f"{row['validation_bound']:.4g}"
            self.tqdm.set_postfix(shown)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.tqdm.close()


class HeldInterrupt:
    """Hold Ctrl-C back until a step is complete; a second one interrupts at once.

    An interrupt in the middle of an optimiser step would leave half of the weights moved.
    """

    def __init__(self) -> None:
        self.asked = False
        self._installed = False

    def __enter__(self) -> HeldInterrupt:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def _handle(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise the interrupt that was held back."""
        if self.asked:
            self.asked = False
            raise KeyboardInterrupt
