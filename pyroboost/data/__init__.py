"""Data sets: small images as rows of bits or grey levels, split once and for all; toy densities.

Files are looked for in ``folder=``, in ``PYROBOOST_DATA`` or in the user's cache folder. A file
that is there is read as it is; one that is missing is downloaded and checked. Polarity,
orientation and splits are fixed in :mod:`pyroboost.data.conventions`.
"""

from pyroboost.data.baselines import independent_bernoulli_log_likelihood, uniform_log_likelihood
from pyroboost.data.batches import ImageBatches, StochasticBits
from pyroboost.data.binarize import binarize, fixed_bits, threshold_bits
from pyroboost.data.celeba import celeba
from pyroboost.data.dataset import Dataset
from pyroboost.data.energies import ENERGIES, energy_log_density
from pyroboost.data.files import DataError, data_folder
from pyroboost.data.grids import Grid, plane_grid
from pyroboost.data.images import caltech_silhouettes, digits, frey_faces, omniglot
from pyroboost.data.labelled import keep_labels, labelled_batches
from pyroboost.data.mnist import cmnist, mnist
from pyroboost.data.tea import TEA_LOG_LIKELIHOOD, tea, tea_images
from pyroboost.data.toys import TOYS, Toy, toy

__all__ = [
    "ENERGIES",
    "TEA_LOG_LIKELIHOOD",
    "TOYS",
    "DataError",
    "Dataset",
    "Grid",
    "ImageBatches",
    "StochasticBits",
    "Toy",
    "binarize",
    "caltech_silhouettes",
    "celeba",
    "cmnist",
    "data_folder",
    "digits",
    "energy_log_density",
    "fixed_bits",
    "frey_faces",
    "independent_bernoulli_log_likelihood",
    "keep_labels",
    "labelled_batches",
    "mnist",
    "omniglot",
    "plane_grid",
    "tea",
    "tea_images",
    "threshold_bits",
    "toy",
    "uniform_log_likelihood",
]
