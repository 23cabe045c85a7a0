"""How good a model is: likelihoods with their kind and error, bounds, posterior quality, ArviZ."""

from pyroboost.evaluation.bounds import Decomposition, Term, decompose
from pyroboost.evaluation.classification import Predicted, class_probabilities
from pyroboost.evaluation.inference_data import to_arviz
from pyroboost.evaluation.likelihood import elbo, importance_bound, log_likelihood
from pyroboost.evaluation.loo import psis_loo
from pyroboost.evaluation.posterior import PosteriorQuality, posterior_quality
from pyroboost.evaluation.scores import accuracy, brier_score, expected_calibration_error
from pyroboost.evaluation.weights import Draw, bound_draw, draw, log_weights
from pyroboost.sampling.psis import good_k, pareto_k, psis_resample

__all__ = [
    "Decomposition",
    "Draw",
    "PosteriorQuality",
    "Predicted",
    "Term",
    "accuracy",
    "bound_draw",
    "brier_score",
    "class_probabilities",
    "decompose",
    "draw",
    "elbo",
    "expected_calibration_error",
    "good_k",
    "importance_bound",
    "log_likelihood",
    "log_weights",
    "pareto_k",
    "posterior_quality",
    "psis_loo",
    "psis_resample",
    "to_arviz",
]
