"""Distributions that Pyro lacks."""

from pyroboost.distributions.boosted_flow import BoostedFlow, Strata
from pyroboost.distributions.components import Components
from pyroboost.distributions.flow_law import FlowLaw
from pyroboost.distributions.rbm import RBM

__all__ = ["RBM", "BoostedFlow", "Components", "FlowLaw", "Strata"]
