"""Samplers on tensors: Gibbs, Metropolis, enumeration, bridges, annealed and plain importance.

Tensors go in and tensors come out, batched, on any device; every function that draws takes a
`generator` and repeats its draws when the generator is seeded again.
"""

from pyroboost.sampling.ais import (
    AnnealedEstimate,
    annealed_log_partition,
    reverse_annealed_log_partition,
)
from pyroboost.sampling.bridge import Bridge, bridge_log_ratio
from pyroboost.sampling.chains import Chains
from pyroboost.sampling.enumeration import (
    binary_states,
    exact_log_partition,
    exact_samples,
    free_energy,
)
from pyroboost.sampling.gibbs import block_gibbs, draw_bits
from pyroboost.sampling.importance import (
    LogMean,
    effective_sample_size,
    log_mean_exp,
    normalised_weights,
    resample,
)
from pyroboost.sampling.metropolis import Walk, flip_gibbs, independence_metropolis, random_walk
from pyroboost.sampling.paths import AnnealedPath, annealed_path

__all__ = [
    "AnnealedEstimate",
    "AnnealedPath",
    "Bridge",
    "Chains",
    "LogMean",
    "Walk",
    "annealed_log_partition",
    "annealed_path",
    "binary_states",
    "block_gibbs",
    "bridge_log_ratio",
    "draw_bits",
    "effective_sample_size",
    "exact_log_partition",
    "exact_samples",
    "flip_gibbs",
    "free_energy",
    "independence_metropolis",
    "log_mean_exp",
    "normalised_weights",
    "random_walk",
    "resample",
    "reverse_annealed_log_partition",
]
