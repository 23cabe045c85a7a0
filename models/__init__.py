"""Meta-models to start from: each is a Pyro model/guide pair with a visible and a hidden site."""

from pyroboost.models.advice import Advice, advise
from pyroboost.models.bernoulli_mixture import BernoulliMixture
from pyroboost.models.conv_vae import ConvVAE
from pyroboost.models.flow_mixture import FlowMixture
from pyroboost.models.gated_conv import GatedConvVAE
from pyroboost.models.gmm import GMM
from pyroboost.models.iwae import IWAE
from pyroboost.models.lvae import LVAE
from pyroboost.models.m2 import M2
from pyroboost.models.rbm import RBM
from pyroboost.models.vae import VAE

__all__ = [
    "GMM",
    "IWAE",
    "LVAE",
    "M2",
    "RBM",
    "VAE",
    "Advice",
    "BernoulliMixture",
    "ConvVAE",
    "FlowMixture",
    "GatedConvVAE",
    "advise",
]
