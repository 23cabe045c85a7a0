"""The experiments on gradient boosted flows, by name."""

from __future__ import annotations

from pyroboost.experiments.runner import Experiment

__all__ = ["FLOWS"]

PAPER = "Gradient boosted flows"
FLOWS: tuple[Experiment, ...] = ()
