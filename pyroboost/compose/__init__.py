"""Compositions of meta-models that are meta-models again."""

from pyroboost.compose.cascade import Cascade
from pyroboost.compose.energy import Ratio
from pyroboost.compose.mixture import Mixture
from pyroboost.compose.partition import Partition
from pyroboost.compose.product import Product

__all__ = ["Cascade", "Mixture", "Partition", "Product", "Ratio"]
