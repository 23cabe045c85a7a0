"""How good a model is: likelihoods with their kind and error, bounds, posterior quality."""

from pyroboost.evaluation.bounds import Decomposition, Term, decompose
from pyroboost.evaluation.likelihood import elbo, importance_bound, log_likelihood
from pyroboost.evaluation.weights import Draw, draw, log_weights

__all__ = [
    "Decomposition",
    "Draw",
    "Term",
    "decompose",
    "draw",
    "elbo",
    "importance_bound",
    "log_likelihood",
    "log_weights",
]
