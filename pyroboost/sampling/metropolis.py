r"""Markov chains for densities known up to a constant: many chains advance as one tensor.

A state keeps the terms of the log density with which it was accepted. Where those are estimates
this is what makes the chain right: the estimate is part of the state (pseudo-marginal), and
drawing it anew for the state that stays would change the law that the chain leaves invariant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyroboost.sampling.enumeration import binary_states

__all__ = ["Walk", "flip_gibbs", "independence_metropolis", "random_walk"]

Terms = Callable[[Tensor], Tensor]


class Walk(NamedTuple):
    """States that chains have reached.

    Attributes:
        state: the states.  # (C, *E)
        terms: terms of their log densities, as they were when the states were entered.  # (P, C)
        accepted: share of proposals that were accepted, over all chains.
    """

    state: Tensor
    terms: Tensor
    accepted: float


@torch.no_grad()
def independence_metropolis(
    log_weights: Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, float]:
    r"""Run chains whose proposals do not depend on where they are, from a table of weights.

    .. math:: P(\text{accept } x' \mid x) = \min\left(1, \frac{w(x')}{w(x)}\right), \qquad
        w(x) = \frac{\tilde q(x)}{g(x)}, \quad x' \sim g

    All proposals and their weights are made beforehand, at one go; what is left is a scan. Each
    weight is used as it was made, so that weights that are unbiased estimates of the ratio (up to
    one constant) leave the law with density in proportion to :math:`\tilde q` invariant, exactly.

    Args:
        log_weights: log w of independent draws from g; column c holds the proposals of chain c in
            turn, and the first row is where the chains start.  # (T, C)
        generator: source of randomness; torch's own by default.

    Returns:
        For each time and chain the row of the proposal that holds  # (T, C)
        and the share of proposals that were accepted.

    Raises:
        ValueError: the table has not two dimensions, or holds NaN or plus infinity.

    Example:
        >>> rows, accepted = independence_metropolis(torch.zeros(4, 2))
        >>> rows[:, 0].tolist(), accepted
        ([0, 1, 2, 3], 1.0)

    Reference:
        Andrieu and Roberts, The pseudo-marginal approach (2009), section 2.
    """
    if log_weights.dim() != 2 or 0 in log_weights.shape:
        raise ValueError(
            f"independence_metropolis: the log weights have shape {tuple(log_weights.shape)}; give "
            "one row per proposal and one column per chain, (T, C)."
        )
    if bool((log_weights.isnan() | (log_weights == math.inf)).any()):
        raise ValueError(
            "independence_metropolis: a log weight is NaN or plus infinity; check the densities "
            "that produced it."
        )
    uniform = torch.empty_like(log_weights).uniform_(generator=generator).log_()
    held = log_weights[0].clone()
    row = torch.zeros(log_weights.shape[1], dtype=torch.long, device=log_weights.device)
    rows = torch.zeros(log_weights.shape, dtype=torch.long, device=log_weights.device)
    moves = 0
    for time in range(1, len(log_weights)):
        offered = log_weights[time]
        # A chain may start where the density is zero; it leaves at the first chance.
        better = (uniform[time] < offered - held) | ((held == -math.inf) & (offered > held))
        held = torch.where(better, offered, held)
        row = torch.where(better, time, row)
        rows[time] = row
        moves += int(better.sum())
    return rows, moves / max(1, (len(log_weights) - 1) * log_weights.shape[1])


@torch.no_grad()
def flip_gibbs(
    state: Tensor,
    terms: Terms,
    coefficients: Tensor,
    *,
    current: Tensor | None = None,
    sweeps: int = 1,
    block: int = 1,
    sites: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Walk:
    r"""Draw blocks of bits from their law given all other bits, in turn.

    .. math:: p(x_B \mid x_{-B}) = \frac{\tilde q(x_B, x_{-B})}{\sum_{y} \tilde q(y, x_{-B})},
        \qquad \log \tilde q(x) = \sum_i a_i t_i(x)

    The terms are asked for once per block, with all :math:`2^{|B|} - 1` other settings of the
    block's bits in all chains side by side.

    Args:
        state: bits to start from.  # (C, *E)
        terms: the terms t of the log density of rows of such states.  # (R, *E) -> (P, R)
        coefficients: their coefficients a.  # (P,)
        current: terms of the states given, where they are known already.  # (P, C)
        sweeps: passes over the sites.
        block: bits that are drawn together.
        sites: which bits are drawn, by their place in a flattened state; all, in an order drawn
            anew in each sweep, when left out.  # (K,)
        generator: source of randomness; torch's own by default.

    Returns:
        New states; a block counts as accepted where it changed.

    Raises:
        ValueError: ``sweeps`` is negative, or a block holds less than 1 or more than 12 bits.

    Example:
        >>> tilt = lambda x: x.sum(-1)[None]
        >>> walk = flip_gibbs(torch.zeros(5, 3), tilt, torch.tensor([2.0]), sweeps=2)
        >>> walk.state.shape, walk.terms.shape
        (torch.Size([5, 3]), torch.Size([1, 5]))

    Reference:
        Geman and Geman, Stochastic relaxation (1984), section XI.
    """
    if sweeps < 0 or not 1 <= block <= 12:
        raise ValueError(
            f"flip_gibbs: sweeps is {sweeps} and block {block}; give 0 or more sweeps of blocks "
            "of 1 to 12 bits."
        )
    chains, flat = len(state), state.reshape(len(state), -1)
    shape, size = state.shape[1:], flat.shape[1]
    rows = torch.arange(chains, device=flat.device)
    held = terms(state) if current is None else current
    changed = tried = 0
    for _ in range(sweeps):
        order = sites
        if order is None:
            keys = torch.empty(size, device=flat.device).uniform_(generator=generator)
            order = keys.argsort()
        for part in torch.split(order, block):
            flips = binary_states(len(part))[1:].to(flat)  # which of the block's bits to flip
            offered = flat.repeat(len(flips), 1, 1)  # (F, C, size)
            offered[:, :, part] = (offered[:, :, part] - flips[:, None]).abs()
            found = terms(offered.reshape(-1, *shape)).reshape(len(held), len(flips), chains)
            table = torch.cat([held[:, None], found], 1)  # (P, 1 + F, C)
            choice = _draw(torch.tensordot(coefficients.to(table), table, 1), generator)
            flat = torch.cat([flat[None], offered])[choice, rows]
            held = table[:, choice, rows]
            changed, tried = changed + int((choice > 0).sum()), tried + chains
    return Walk(flat.reshape(state.shape), held, changed / max(1, tried))


def _draw(table: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a row of each column in proportion to exponentials: Gumbel's way, which is exact."""
    uniform = torch.empty_like(table).uniform_(generator=generator)
    tiny = torch.finfo(table.dtype).tiny
    return (table - (-uniform.clamp_min(tiny).log()).log()).argmax(0)


@torch.no_grad()
def random_walk(
    state: Tensor,
    terms: Terms,
    coefficients: Tensor,
    *,
    scale: Tensor | float,
    current: Tensor | None = None,
    steps: int = 1,
    generator: torch.Generator | None = None,
) -> Walk:
    r"""Move real states by normal steps that are accepted or refused (Metropolis).

    .. math:: x' = x + \sigma \epsilon, \qquad
        P(\text{accept}) = \min(1, \tilde q(x') / \tilde q(x)), \qquad
        \log \tilde q(x) = \sum_i a_i t_i(x)

    Args:
        state: where to start.  # (C, *E)
        terms: the terms t of the log density.  # (C, *E) -> (P, C)
        coefficients: their coefficients a.  # (P,)
        scale: standard deviation of a step, broadcast to the states.
        current: terms of the states given, where they are known already.  # (P, C)
        steps: number of steps.
        generator: source of randomness; torch's own by default.

    Returns:
        New states.

    Example:
        >>> bowl = lambda x: -0.5 * x.square().sum(-1)[None]
        >>> random_walk(torch.zeros(5, 2), bowl, torch.ones(1), scale=1.0).state.shape
        torch.Size([5, 2])

    Reference:
        Metropolis et al., Equation of state calculations by fast computing machines (1953).
    """
    held = terms(state) if current is None else current
    moves = 0
    for _ in range(steps):
        noise = torch.empty_like(state).normal_(generator=generator)
        offered = state + scale * noise
        found = terms(offered)
        gain = coefficients.to(held) @ (found - held)
        better = torch.empty_like(gain).uniform_(generator=generator).log_() < gain
        wide = better.reshape(-1, *[1] * (state.dim() - 1))
        state, held = torch.where(wide, offered, state), torch.where(better, found, held)
        moves += int(better.sum())
    return Walk(state, held, moves / max(1, steps * len(state)))
