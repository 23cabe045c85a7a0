"""Distributions that Pyro lacks."""

from pyroboost.distributions.rbm import RBM

__all__ = ["RBM"]
