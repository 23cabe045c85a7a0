"""Guides of their own, for any Pyro model; the pairs of pyroboost.models bring theirs along."""

from pyroboost.guides.auto_boosted_flow import AutoBoostedFlow
from pyroboost.guides.boosted_flow_guide import BoostedFlowGuide
from pyroboost.guides.flow_guides import FlowGuide

__all__ = ["AutoBoostedFlow", "BoostedFlowGuide", "FlowGuide"]
