"""Samplers on tensors: block Gibbs, enumeration, annealed and plain importance sampling.

Tensors go in and tensors come out, batched, on any device; every function that draws takes a
`generator` and repeats its draws when the generator is seeded again.
"""

from pyroboost.sampling.ais import (
    AnnealedEstimate,
    annealed_log_partition,
    reverse_annealed_log_partition,
)
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

__all__ = [
    "AnnealedEstimate",
    "LogMean",
    "annealed_log_partition",
    "binary_states",
    "block_gibbs",
    "draw_bits",
    "effective_sample_size",
    "exact_log_partition",
    "exact_samples",
    "free_energy",
    "log_mean_exp",
    "normalised_weights",
    "resample",
    "reverse_annealed_log_partition",
]
