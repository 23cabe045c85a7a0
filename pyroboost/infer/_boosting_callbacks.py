"""What runs beside the fit of a round: the rate of blending, and the bound of the mixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyroboost.infer._round_law import Stage
from pyroboost.infer.callbacks import Callback, FitState

__all__ = ["Pace", "Track", "epochs_of"]

_LONGEST, _LEAST = 100, 20  # steps of an epoch at most; epochs at least


def epochs_of(steps: int) -> tuple[int, int]:
    """Return how many epochs a whole-data round has, and of how many steps each.

    There are 20 or more where there are so many steps, since the learning rate falls and the best
    weights are looked for by epochs. The product is the least number of steps that is not below
    what was asked for.

    Example:
        >>> epochs_of(2000), epochs_of(250), epochs_of(7), epochs_of(1999), epochs_of(20_000)
        ((20, 100), (25, 10), (7, 1), (25, 80), (200, 100))
    """
    longest = max(1, min(_LONGEST, steps // _LEAST))
    size = min(range(longest, (longest + 1) // 2 - 1, -1), key=lambda d: -steps % d)
    return -(-steps // size), size


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
