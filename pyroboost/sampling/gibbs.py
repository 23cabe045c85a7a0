r"""Block Gibbs sampling for bipartite binary energies.

Two layers of bits, visible v and hidden h, have the joint density

.. math:: p(v, h) \propto \exp(b^\top v + c^\top h + v^\top W h),

so that each layer is independent Bernoulli given the other. Parameters may carry batch
dimensions, written (*B), each entry being a model of its own; sample dimensions (*S) of the
states stand to the left of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_gibbs", "check_parameters", "draw_bits", "field", "is_binary"]


def check_parameters(
    where: str, visible_bias: Tensor, hidden_bias: Tensor, weight: Tensor
) -> torch.Size:
    """Check that biases and weights belong to one bipartite model and return its batch shape.

    Args:
        where: name of the caller, the first word of the error.
        visible_bias: biases b.  # (*B, V)
        hidden_bias: biases c.  # (*B, H)
        weight: couplings W.  # (*B, V, H)

    Returns:
        The broadcast batch shape (*B).

    Raises:
        ValueError: if the shapes do not fit, or one parameter is not of the weight's floating
            point type and device.

    Example:
        >>> check_parameters("here", torch.zeros(3), torch.zeros(2), torch.zeros(5, 3, 2))
        torch.Size([5])
    """
    parameters = (visible_bias, hidden_bias, weight)
    shapes = ", ".join(str(tuple(p.shape)) for p in parameters)
    told = f"{where}: visible_bias, hidden_bias and weight have shapes {shapes}"
    if visible_bias.dim() < 1 or hidden_bias.dim() < 1 or weight.dim() < 2:
        raise ValueError(f"{told}; give (*B, V), (*B, H) and (*B, V, H).")
    if weight.shape[-2:] != (visible_bias.shape[-1], hidden_bias.shape[-1]):
        raise ValueError(f"{told}; the weight must end in the two numbers of units, V and H.")
    kinds = {(p.dtype, p.device) for p in parameters}
    if len(kinds) > 1 or not weight.is_floating_point():
        raise ValueError(
            f"{where}: visible_bias, hidden_bias and weight must share one floating point type "
            f"and device, but are {', '.join(f'{p.dtype} on {p.device}' for p in parameters)}."
        )
    import numpy as np  # torch's own broadcast_shapes loads a computer algebra system

    try:
        shape = np.broadcast_shapes(
            visible_bias.shape[:-1], hidden_bias.shape[:-1], weight.shape[:-2]
        )
    except ValueError:
        raise ValueError(f"{told}; their batch dimensions do not broadcast.") from None
    return torch.Size(shape)


def is_binary(state: Tensor) -> bool:
    """Tell whether all entries are 0 or 1, the two numbers that are their own squares.

    Example:
        >>> is_binary(torch.tensor([0.0, 1.0])), is_binary(torch.tensor([1.0, torch.nan]))
        (True, False)
    """
    return state.dtype == torch.bool or not bool((state * state - state).any())


def field(state: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    r"""Sum the couplings that a state of one layer switches on in the other, :math:`v^\top W`.

    Args:
        state: states of one layer; give hidden states with ``weight.mT``.  # (*S, *B, V)
        weight: couplings.  # (*B, V, H)
        out: where to write the result.

    Returns:
        The fields on the other layer.  # (*S, *B, H)

    Example:
        >>> field(torch.ones(7, 5, 3), torch.ones(5, 3, 2)).shape
        torch.Size([7, 5, 2])
    """
    if weight.dim() == 2:
        return torch.matmul(state, weight, out=out)
    # einsum keeps one copy of a batch of weights where matmul would repeat it for every sample.
    result = torch.einsum("...v,...vh->...h", state, weight)
    return result if out is None else out.copy_(result)


@torch.no_grad()
def draw_bits(
    logits: Tensor, *, generator: torch.Generator | None = None, out: Tensor | None = None
) -> Tensor:
    r"""Draw independent bits that are one with probability :math:`1 / (1 + e^{-logit})`.

    Args:
        logits: log odds of each bit.  # any shape
        generator: source of randomness on the device of the logits; torch's own by default.
        out: where to write the bits, possibly `logits` itself.

    Returns:
        Zeros and ones in the type of the logits.  # the shape of the logits

    Example:
        >>> draw_bits(torch.tensor([-200.0, 200.0])).tolist()
        [0.0, 1.0]
    """
    probs = torch.sigmoid(logits, out=out)
    return torch.lt(_uniform_like(probs, generator), probs, out=probs)


def _uniform_like(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    if probs.dtype != torch.float32 or probs.device.type != "cpu":
        return torch.empty_like(probs).uniform_(generator=generator)
    # Two numbers of 24 random bits from each 64-bit draw: all that single precision can hold, in
    # two thirds of the time of `uniform_`, which takes as long as a matrix product.
    draws = torch.empty((probs.numel() + 1) // 2, dtype=torch.int64)
    draws.random_(-(2**63), None, generator=generator)
    halves = draws.view(torch.int32).bitwise_and_(2**24 - 1)[: probs.numel()]
    return halves.to(torch.float32).mul_(2.0**-24).view(probs.shape)


@torch.no_grad()
def block_gibbs(
    visible: Tensor,
    visible_bias: Tensor,
    hidden_bias: Tensor,
    weight: Tensor,
    *,
    sweeps: int = 1,
    inverse_temperature: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Run sweeps of block Gibbs sampling from given visible states.

    One sweep draws all hidden units given the visible ones, then all visible units given the
    hidden ones, and leaves invariant

    .. math:: p_\beta(v, h) \propto \exp(\beta (b^\top v + c^\top h + v^\top W h)).

    Start a chain from hidden states by exchanging the roles of the layers: pass them first, with
    the two biases exchanged and ``weight.mT``.

    Args:
        visible: states to start from.  # (*S, *B, V)
        visible_bias: biases b.  # (*B, V)
        hidden_bias: biases c.  # (*B, H)
        weight: couplings W.  # (*B, V, H)
        sweeps: number of sweeps; 0 draws only the hidden units of the given visible states.
        inverse_temperature: one number, or one per chain.  # broadcasts to (*S, *B)
        generator: source of randomness on the device of the weights; torch's own by default.

    Returns:
        New visible states  # (*S, *B, V)
        and the hidden states drawn in the last sweep, from which they were drawn.  # (*S, *B, H)

    Raises:
        ValueError: if shapes do not fit or `sweeps` is negative.

    Example:
        >>> visible, hidden = block_gibbs(
        ...     torch.zeros(4, 3), torch.zeros(3), torch.zeros(2), torch.ones(3, 2), sweeps=5
        ... )
        >>> visible.shape, hidden.shape
        (torch.Size([4, 3]), torch.Size([4, 2]))

    Reference:
        Hinton, A practical guide to training restricted Boltzmann machines (2010), section 2.
    """
    check_parameters("block_gibbs", visible_bias, hidden_bias, weight)
    if sweeps < 0:
        raise ValueError(f"block_gibbs: sweeps is {sweeps}; give zero or a positive number.")
    if visible.shape[-1:] != visible_bias.shape[-1:]:
        raise ValueError(
            f"block_gibbs: the visible states have shape {tuple(visible.shape)}; their last "
            f"dimension must be the {visible_bias.shape[-1]} visible units."
        )
    scale = torch.as_tensor(inverse_temperature, dtype=weight.dtype, device=weight.device)
    scale = scale.unsqueeze(-1)

    def draw(state: Tensor, couplings: Tensor, bias: Tensor) -> Tensor:
        logits = (field(state, couplings) + bias) * scale
        return draw_bits(logits, generator=generator, out=logits)

    visible = visible.to(weight.dtype)
    hidden = draw(visible, weight, hidden_bias)
    for sweep in range(sweeps):
        if sweep:
            hidden = draw(visible, weight, hidden_bias)
        visible = draw(hidden, weight.mT, visible_bias)
    return visible, hidden
