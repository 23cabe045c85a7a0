"""Inference: the one training loop and what stands around it."""

from pyroboost.infer.additive import Added, Addition, additive
from pyroboost.infer.boosting import BoostedRound, Boosting, WeightDescent, boost
from pyroboost.infer.callbacks import Callback, FitState
from pyroboost.infer.convergence import Convergence, check_convergence
from pyroboost.infer.errors import CheckpointError, FitError, NonFiniteLoss
from pyroboost.infer.fit import Fit, fit
from pyroboost.infer.gains import Gain, stage_gain
from pyroboost.infer.gradient_variance import GradientNoise, gradient_variance
from pyroboost.infer.greedy import Boosted, StageReport, greedy
from pyroboost.infer.importance_weighted import ImportanceWeightedELBO
from pyroboost.infer.multiplicative import Multiplied, RoundReport, multiplicative
from pyroboost.infer.objectives import TemperedELBO, scale_latents
from pyroboost.infer.stratified import StratifiedELBO

__all__ = [
    "Added",
    "Addition",
    "Boosted",
    "BoostedRound",
    "Boosting",
    "Callback",
    "CheckpointError",
    "Convergence",
    "Fit",
    "FitError",
    "FitState",
    "Gain",
    "GradientNoise",
    "ImportanceWeightedELBO",
    "Multiplied",
    "NonFiniteLoss",
    "RoundReport",
    "StageReport",
    "StratifiedELBO",
    "TemperedELBO",
    "WeightDescent",
    "additive",
    "boost",
    "check_convergence",
    "fit",
    "gradient_variance",
    "greedy",
    "multiplicative",
    "scale_latents",
    "stage_gain",
]
