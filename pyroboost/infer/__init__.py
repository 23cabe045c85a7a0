"""Inference: the one training loop and what stands around it."""

from pyroboost.infer.callbacks import Callback, FitState
from pyroboost.infer.convergence import Convergence, check_convergence
from pyroboost.infer.errors import CheckpointError, FitError, NonFiniteLoss
from pyroboost.infer.fit import Fit, fit
from pyroboost.infer.gains import Gain, stage_gain
from pyroboost.infer.greedy import Boosted, StageReport, greedy
from pyroboost.infer.objectives import scale_latents

__all__ = [
    "Boosted",
    "Callback",
    "CheckpointError",
    "Convergence",
    "Fit",
    "FitError",
    "FitState",
    "Gain",
    "NonFiniteLoss",
    "StageReport",
    "check_convergence",
    "fit",
    "greedy",
    "scale_latents",
    "stage_gain",
]
