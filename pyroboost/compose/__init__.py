"""Compositions of meta-models that are meta-models again."""

from pyroboost.compose.cascade import Cascade

__all__ = ["Cascade"]
