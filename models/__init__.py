"""Meta-models to start from: each is a Pyro model/guide pair with a visible and a hidden site."""

from pyroboost.models.gmm import GMM
from pyroboost.models.rbm import RBM
from pyroboost.models.vae import VAE

__all__ = ["GMM", "RBM", "VAE"]
