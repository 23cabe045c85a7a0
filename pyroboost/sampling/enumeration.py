r"""Exact sums and exact samples of bipartite binary energies with one small layer.

Each state of the smaller layer is visited once, with the other layer summed out analytically:
:math:`2^n` terms for n units, in blocks of bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from pyroboost.sampling.gibbs import check_parameters, draw_bits, field
from pyroboost.sampling.importance import resample

__all__ = ["MAX_UNITS", "binary_states", "exact_log_partition", "exact_samples", "free_energy"]

MAX_UNITS = 20
"""The largest number of units of a layer whose states are enumerated."""

_BLOCK = 2**22  # elements of the largest tensor of one block
_TABLE = 2**24  # elements of a table of all states, kept while samples are drawn from it


def free_energy(
    visible: Tensor, visible_bias: Tensor, hidden_bias: Tensor, weight: Tensor
) -> Tensor:
    r"""Sum the hidden layer out of the energy, :math:`p(v) = e^{-F(v)} / Z`.

    .. math:: F(v) = -b^\top v - \sum_j \log(1 + e^{c_j + (v^\top W)_j})

    Args:
        visible: visible states.  # (*S, *B, V)
        visible_bias: biases b.  # (*B, V)
        hidden_bias: biases c.  # (*B, H)
        weight: couplings W.  # (*B, V, H)

    Returns:
        Free energies in nats.  # (*S, *B)

    Example:
        >>> energy = free_energy(torch.ones(7, 3), torch.ones(3), torch.zeros(2), torch.zeros(3, 2))
        >>> energy.shape, bool(torch.allclose(energy, -3 - 2 * torch.tensor(2.0).log()))
        (torch.Size([7]), True)

    Reference:
        Hinton, A practical guide to training restricted Boltzmann machines (2010), section 16.1.
    """
    # Beyond torch's own threshold of 20 the linear branch would be wrong in double precision.
    summed = softplus(field(visible, weight) + hidden_bias, threshold=50.0).sum(-1)
    if visible_bias.dim() == 1:
        return -(summed + visible @ visible_bias)
    return -(summed + (visible * visible_bias).sum(-1))


def binary_states(num_units: int, *, start: int = 0, stop: int | None = None) -> Tensor:
    r"""List states of a layer of bits, unit 0 being the lowest digit of the state's number.

    Args:
        num_units: number of units n.
        start: number of the first state.
        stop: number after the last state; :math:`2^n` by default.

    Returns:
        Zeros and ones as integers.  # (stop - start, n)

    Example:
        >>> binary_states(2).tolist()
        [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    return _digits(torch.arange(start, 2**num_units if stop is None else stop), num_units)


def exact_log_partition(visible_bias: Tensor, hidden_bias: Tensor, weight: Tensor) -> Tensor:
    r"""Compute log Z, with its gradient, by summing over the smaller layer.

    .. math:: \log Z = \log \sum_h e^{c^\top h} \prod_i (1 + e^{b_i + (W h)_i})

    Memory is bounded in both directions: where gradients are recorded, each block of states is
    computed again in the backward pass.

    Args:
        visible_bias: biases b.  # (*B, V)
        hidden_bias: biases c.  # (*B, H)
        weight: couplings W.  # (*B, V, H)

    Returns:
        log Z in nats.  # (*B,)

    Raises:
        ValueError: if shapes do not fit or both layers have more than 20 units.

    Example:
        >>> log_partition = exact_log_partition(torch.zeros(30), torch.zeros(2), torch.zeros(30, 2))
        >>> bool(torch.isclose(log_partition, 32 * torch.tensor(2.0).log()))
        True
    """
    small = _smaller("exact_log_partition", visible_bias, hidden_bias, weight)
    blocks = list(_blocks(*small))
    # A single block is kept whole: computing it twice would save nothing.
    again = len(blocks) > 1 and torch.is_grad_enabled()
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    sums = [
        checkpoint(_log_sum, *block, *small, **options) if again else _log_sum(*block, *small)
        for block in blocks
    ]
    return torch.stack(sums).logsumexp(0)


@torch.no_grad()
def exact_samples(
    visible_bias: Tensor,
    hidden_bias: Tensor,
    weight: Tensor,
    *,
    num_samples: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw independent samples: the smaller layer from its table, the other one given it.

    Args:
        visible_bias: biases b.  # (*B, V)
        hidden_bias: biases c.  # (*B, H)
        weight: couplings W.  # (*B, V, H)
        num_samples: number of samples S.
        generator: source of randomness on the device of the weights; torch's own by default.

    Returns:
        Visible states  # (S, *B, V)
        and hidden states.  # (S, *B, H)

    Raises:
        ValueError: if shapes do not fit or both layers have more than 20 units.

    Example:
        >>> parameters = torch.zeros(4), torch.zeros(2), torch.ones(4, 2)
        >>> visible, hidden = exact_samples(*parameters, num_samples=3)
        >>> visible.shape, hidden.shape
        (torch.Size([3, 4]), torch.Size([3, 2]))
    """
    batch = check_parameters("exact_samples", visible_bias, hidden_bias, weight)
    small_bias, large_bias, couplings = _smaller("exact_samples", visible_bias, hidden_bias, weight)
    num_units = small_bias.shape[-1]
    if batch and batch.numel() * 2**num_units > _TABLE:
        # One table at a time: together they would not fit in memory.
        tables = (
            visible_bias.expand(*batch, -1),
            hidden_bias.expand(*batch, -1),
            weight.expand(*batch, -1, -1),
        )
        draws = [
            exact_samples(*one, num_samples=num_samples, generator=generator)
            for one in zip(*tables, strict=True)
        ]
        visible, hidden = (torch.stack(layer, 1) for layer in zip(*draws, strict=True))
        return visible, hidden
    parts = [
        _log_weights(*block, small_bias, large_bias, couplings)
        for block in _blocks(small_bias, large_bias, couplings)
    ]
    states = resample(torch.cat(parts), num_samples, generator=generator)
    small = _digits(states, num_units).to(weight.dtype)
    large = draw_bits(field(small, couplings) + large_bias, generator=generator)
    return (large, small) if visible_bias.shape[-1] > num_units else (small, large)


def _smaller(
    where: str, visible_bias: Tensor, hidden_bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Order the parameters with the smaller layer first."""
    check_parameters(where, visible_bias, hidden_bias, weight)
    num_visible, num_hidden = weight.shape[-2:]
    if min(num_visible, num_hidden) > MAX_UNITS:
        raise ValueError(
            f"{where}: the layers have {num_visible} and {num_hidden} units and enumeration needs "
            f"one of at most {MAX_UNITS}; estimate by annealed importance sampling instead."
        )
    if num_hidden < num_visible:
        return hidden_bias, visible_bias, weight.mT
    return visible_bias, hidden_bias, weight


def _blocks(small_bias: Tensor, large_bias: Tensor, weight: Tensor) -> Iterator[tuple[int, int]]:
    """Cut the states of the smaller layer into ranges whose tensors stay within bounds."""
    batch = check_parameters("enumeration", small_bias, large_bias, weight)
    total = 2 ** small_bias.shape[-1]
    size = max(1, _BLOCK // max(1, batch.numel() * large_bias.shape[-1]))
    for start in range(0, total, size):
        yield start, min(start + size, total)


def _log_weights(
    start: int, stop: int, small_bias: Tensor, large_bias: Tensor, weight: Tensor
) -> Tensor:
    """Return the unnormalised log marginals of a range of states, of shape (stop - start, *B)."""
    batch = check_parameters("enumeration", small_bias, large_bias, weight)
    states = binary_states(small_bias.shape[-1], start=start, stop=stop).to(small_bias)
    states = states.view(stop - start, *(1 for _ in batch), -1)
    return -free_energy(states, small_bias, large_bias, weight).expand(stop - start, *batch)


def _log_sum(start: int, stop: int, *parameters: Tensor) -> Tensor:
    return _log_weights(start, stop, *parameters).logsumexp(0)


def _digits(numbers: Tensor, num_units: int) -> Tensor:
    places = torch.arange(num_units, device=numbers.device)
    return (numbers.unsqueeze(-1) >> places) & 1
