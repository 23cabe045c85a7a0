"""What runs beside the fit of a round: the rate of blending, and the bound of the mixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyroboost.infer._round_law import Stage
from pyroboost.infer.callbacks import Callback, FitState

__all__ = ["Pace", "Track", "steps_per_epoch"]

_EPOCH = 100  # steps that count as an epoch, where data are the model's arguments


def steps_per_epoch(steps: int) -> int:
    """Return how many steps of a whole-data round count as an epoch of its fit.

    Example:
        >>> steps_per_epoch(2000), steps_per_epoch(250), steps_per_epoch(7), steps_per_epoch(1999)
        (100, 50, 7, 1999)
    """
    best = max(d for d in range(1, min(_EPOCH, steps) + 1) if steps % d == 0)
    return best if best >= min(20, steps) else steps


class Pace(Callback):
    """Blend more and more in, from 0 at the start of a round to the rate asked for at its end.

    Args:
        stage: the stage whose rate is set.
        blend: the last rate.
        epochs: epochs of the round.
        batches: batches of an epoch, where that is known.
    """

    def __init__(self, stage: Stage, blend: float, epochs: int, batches: int | None) -> None:
        self.stage, self.blend, self.epochs, self.batches = stage, blend, epochs, batches

    def on_start(self, state: FitState) -> None:
        """Take the rate up where a resumed fit stands."""
        self.on_batch(state)

    def on_batch(self, state: FitState) -> None:
        """Raise the rate for the next batch."""
        part = state.batch / self.batches if self.batches else 0.0
        done = (state.epoch - 1 + part) / self.epochs
        self.stage.rate = self.blend * min(1.0, done)


class Track(Callback):
    """Add measurements to the row of each epoch, from where a checkpoint keeps them.

    Args:
        measure: the measurements, by name.
    """

    def __init__(self, measure: Callable[[], dict[str, Any]]) -> None:
        self.measure = measure

    def on_epoch(self, state: FitState) -> None:
        """Measure."""
        state.history[-1].update(self.measure())
