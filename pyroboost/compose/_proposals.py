"""Draws that log Z and chains are made from: of the parts, or all states of a few bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyroboost.compose.densities import draw_rows, units
from pyroboost.sampling import binary_states
from pyroboost.sampling.enumeration import MAX_UNITS

if TYPE_CHECKING:
    from pyroboost.compose._factors import Factors

__all__ = [
    "Proposal",
    "Proposals",
    "check_proposal",
    "propose",
    "search_table",
    "state_table",
    "summable",
]

Proposal = int | Literal["mixture"]


class Proposals(NamedTuple):
    """Draws and what they weigh.

    Args:
        x: draws.  # (n, ...)
        log_weights: log of the product's density over the proposal's, up to log Z.  # (n,)
        table: log densities of the parts; a row of NaN where it cancels.  # (P, n)
        log_proposal: log density of the proposal; NaN where it cancels.  # (n,)
        shares: share of each part that proposes.
    """

    x: Tensor
    log_weights: Tensor
    table: Tensor
    log_proposal: Tensor
    shares: dict[int, float]

    def responsibilities(self) -> dict[int, float]:
        """Return each proposing part's share of the proposal's density under the product."""
        weights = self.log_weights.double().softmax(0)
        return {
            part: 1.0
            if len(self.shares) == 1
            else float(weights @ (self.table[part] + math.log(s) - self.log_proposal).exp())
            for part, s in self.shares.items()
        }


def check_proposal(product: Factors, proposal: Proposal) -> list[int]:
    """Return the parts that propose, or say what is wrong with them."""
    if proposal == "mixture":
        return product.samplers
    if not isinstance(proposal, int) or proposal not in product.samplers:
        raise ValueError(
            f"Product: the proposal is {proposal!r}; give 'mixture' or the place of a part that "
            f"can be sampled, one of {product.samplers}."
        )
    return [proposal]


@torch.no_grad()
def propose(
    product: Factors,
    count: int,
    proposal: Proposal = "mixture",
    *,
    num_samples: int | None = None,
    memory: float = 256.0,
    shares: Sequence[float] | None = None,
    independent: bool = False,
) -> Proposals:
    r"""Draw from one part, or from the mixture of all, and weigh the draws.

    From part i, whose density cancels where its power is 1,
    $\log w = \sum_j a_j \log m_j(x) - \log m_i(x)$; from the mixture the denominator is
    $\log \sum_i s_i m_i(x)$ (balance heuristic), with which no weight exceeds what the best of
    the parts would give it.

    Args:
        product: the product.
        count: draws n.
        proposal: the place of a part, or ``"mixture"``.
        num_samples: importance samples per draw for parts that do not know their density.
        memory: bound on their working memory, in MiB.
        shares: shares of the mixture, equal when left out.  # one per part that can be sampled
        independent: draw the part of each draw of the mixture too, and leave them in that order;
            else the numbers are as the shares say, which has less variance.
    """
    places = check_proposal(product, proposal)
    share = torch.ones(len(places)) if shares is None else torch.as_tensor(shares).float()
    if share.shape != (len(places),) or not bool((share > 0).all()):
        raise ValueError(
            f"Product: shares are {shares}; give one positive number for each of the "
            f"{len(places)} parts that propose."
        )
    share = (share / share.sum()).double()
    counts = _counts(share, count, independent)
    share = share if independent else counts.double() / count
    drawn = [draw_rows(product[i], int(n)) for i, n in zip(places, counts, strict=True) if n]
    x = torch.cat(drawn)
    if independent and len(places) > 1:
        x = x[torch.randperm(len(x), device=x.device)]
    cancels = proposal if proposal != "mixture" and float(product.powers[proposal]) == 1.0 else None
    skip = () if cancels is None else (cancels,)
    table = product.table(x, num_samples=num_samples, memory=memory, skip=skip)
    powers = product.powers.to(table)
    kept = [j for j in range(len(table)) if j not in skip]
    log_weights = powers[kept] @ table[kept] if kept else torch.zeros_like(table[0])
    used = [(i, s) for i, s in zip(places, share.tolist(), strict=True) if s > 0]
    log_proposal = torch.stack([table[i] + math.log(s) for i, s in used]).logsumexp(0)
    if cancels is None:
        log_weights = log_weights - log_proposal
    return Proposals(x, log_weights, table, log_proposal, dict(used))


def _counts(share: Tensor, count: int, independent: bool) -> Tensor:
    if independent:
        return torch.bincount(
            torch.multinomial(share, count, replacement=True), minlength=len(share)
        )
    edges = (share.cumsum(0) * count).round().long()
    return edges.diff(prepend=edges.new_zeros(1))


def summable(product: Factors) -> bool:
    """Tell whether log Z is a sum over few states of exact densities."""
    small = product.support == "bits" and units(product.visible_shape) <= MAX_UNITS
    return small and not product.estimated


@torch.no_grad()
def state_table(product: Factors) -> tuple[Tensor, Tensor]:
    """Return all states of a small product of bits and their log densities, up to log Z."""
    size = units(product.visible_shape)
    if not summable(product):
        raise ValueError(
            f"Product: exact sums need bits, at most {MAX_UNITS} of them, and parts that know "
            f"their densities; these are {product.support}, {size} of them, and parts "
            f"{product.estimated or 'none'} are estimated; use 'importance', 'bridge' or 'ais'."
        )
    like = product.template(0)
    blocks = []
    for start in range(0, 2**size, 2**14):
        states = binary_states(size, start=start, stop=min(start + 2**14, 2**size)).to(like)
        states = states.reshape(-1, *(product.visible_shape or ()))
        table = product.table(states)
        blocks.append((states, product.powers.to(table) @ table))
    return torch.cat([s for s, _ in blocks]), torch.cat([d for _, d in blocks])


def search_table(product: Factors, count: int, **options: Any) -> tuple[Tensor, Tensor, bool]:
    r"""Return what log Z of any powers of these parts can be had from: one set of draws.

    $\log Z(a) = \log \frac1n \sum_s \exp(\sum_i a_i \log m_i(x_s) - \log g(x_s))$

    Args:
        product: the parts.
        count: number of draws, where the sum is not exact.
        **options: of :func:`propose`.

    Returns:
        Log densities of the parts, (P, n), and of the proposal, (n,), and whether the draws are
        all states, each once, so that log Z is exact.
    """
    if summable(product):
        states, _ = state_table(product)
        table = product.table(states)
        return table, torch.full_like(table[0], -math.log(len(states))), True
    found = propose(product, count, "mixture", **options)
    return found.table, found.log_proposal, False
