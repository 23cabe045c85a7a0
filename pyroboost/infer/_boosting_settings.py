"""What boosting was asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import CosineAnnealingLR

from pyroboost.infer._mixture_weights import WeightDescent
from pyroboost.infer._round_law import OBJECTIVES

__all__ = ["BoostSettings"]

_WEIGHTS = ("simplex", "line", "gradient", "equal")
_OWN = {
    "loss",
    "weights",
    "validation_weights",
    "checkpoint",
    "resume",
    "data",
    "pair",
}


@dataclass
class BoostSettings:
    """What :func:`pyroboost.infer.boost` was asked for; its docstring explains each."""

    steps: int | None
    epochs: int | None
    batch_size: int
    objective: str
    entropy: float
    floor: float | None
    blend: float | None
    weights: str | WeightDescent
    finetune: int
    finetune_length: int | None
    finetune_objective: str
    joint: int
    start: int
    failures: int
    threshold: float
    num_particles: int | None
    num_samples: int | None
    evaluate_on: int
    track: bool
    checkpoints: Path | None
    seed: int | None
    fit: dict[str, Any]

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"boost: steps={self.steps} and epochs={self.epochs}; give steps= for data that "
                "are the model's arguments, or epochs= for data that come in batches."
            )
        for name, allowed in (
            ("objective", OBJECTIVES),
            ("finetune_objective", OBJECTIVES),
            ("weights", _WEIGHTS),
        ):
            value = getattr(self, name)
            if value not in allowed and not (
                name == "weights" and isinstance(value, WeightDescent)
            ):
                raise ValueError(f"boost: {name} is {value!r}; take one of {', '.join(allowed)}.")
        if not 0 < self.entropy < math.inf:
            raise ValueError(f"boost: entropy is {self.entropy}; take a positive number.")
        if self.floor is not None and not 0 < self.floor < math.inf:
            raise ValueError(
                f"boost: floor is {self.floor}; take nats below the mixture's own "
                "mean, a positive number, or None."
            )
        if self.blend is not None and not 0 <= self.blend < 1:
            raise ValueError(f"boost: blend is {self.blend}; take a rate from 0 to below 1.")
        least = {
            "length": 1, "finetune": 0, "finetune_length": 1, "joint": 0, "start": 0,
            "failures": 1, "threshold": 0, "num_particles": 1, "num_samples": 2, "evaluate_on": 2,
        }  # fmt: skip
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise ValueError(f"boost: {name} is {value}; take {number} or more.")
        if self.whole and self.fit.get("transform") is not None:
            raise ValueError(
                "boost: transform is for epochs=, where data come in batches; with steps= let the "
                "model transform its arguments."
            )
        for name in sorted(_OWN & set(self.fit)):
            raise ValueError(f"boost: {name} is not to be chosen here; leave it out.")

    @property
    def whole(self) -> bool:
        """Whether data are the model's arguments."""
        return self.steps is not None

    @property
    def length(self) -> int:
        """Steps or epochs of a round."""
        return int(self.steps if self.steps is not None else self.epochs or 0)

    def particles(self, together: bool) -> int:
        """Return the draws of the training loss, more where they are taken together."""
        if self.num_particles is not None:
            return self.num_particles
        return (16 if together else 4) if self.whole else 1

    def fit_settings(self, epochs: int, size: int, together: bool) -> dict[str, Any]:
        """Return the settings of a fit; for whole data, those that were left out are chosen.

        Args:
            epochs: epochs of the fit.
            size: steps of an epoch of a fit of whole data.
            together: whether draws are taken together.
        """
        given = dict(self.fit)
        if not self.whole:
            return given
        if given.get("lr") is None and given.get("optimizer") is None:
            given["lr"] = 5e-3
        own = {
            "scheduler": partial(CosineAnnealingLR, T_max=epochs),
            "clip_norm": 10.0,
            "max_skipped": epochs * size // 20,
            "num_validation_particles": 200 if together else 16,
        }
        return {**own, **given}

    @property
    def fine_length(self) -> int:
        """Steps or epochs of a component's fine-tuning."""
        return self.finetune_length or max(1, self.length // 4)

    @property
    def descent(self) -> WeightDescent:
        """How Algorithm 1 goes."""
        return self.weights if isinstance(self.weights, WeightDescent) else WeightDescent()
