"""Boosting and composing Pyro model/guide pairs, with an honest measure of the result."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

from pyroboost.compose import Cascade, Mixture, Product
from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel

__all__ = ["Cascade", "Likelihood", "MetaModel", "Mixture", "Product", "__version__"]

try:
    __version__ = _version("pyroboost")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"
