"""Estimates of a product's log Z, each with its error and with what speaks against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyroboost.compose.densities import draw_rows, units
from pyroboost.sampling import binary_states, log_mean_exp
from pyroboost.sampling.bridge import bridge_log_ratio
from pyroboost.sampling.enumeration import MAX_UNITS
from pyroboost.sampling.metropolis import flip_gibbs, random_walk
from pyroboost.sampling.paths import Terms, Transition, annealed_path
from pyroboost.sampling.psis import good_k, pareto_k

if TYPE_CHECKING:
    from pyroboost.compose.product import Product

__all__ = ["METHODS", "Method", "Partition", "Proposal", "Proposals", "estimate", "propose"]

Method = Literal["closed form", "exact", "importance", "bridge", "ais"]
METHODS: tuple[Method, ...] = ("closed form", "exact", "importance", "bridge", "ais")
Proposal = int | Literal["mixture"]

_PARETO_DRAWS = 25
_R_HAT = 1.05
_FEW = 64  # bits; a sweep of Gibbs steps through more costs more than it brings


@dataclass(frozen=True)
class Partition:
    """The log Z of a product, in nats, with what is known of its error.

    Args:
        value: log Z.
        std_error: its standard error; 0 where it is exact.
        method: how it was had.
        ess: effective sample size of the weights; NaN where there were none.
        pareto_k: Pareto k of the weights; NaN likewise.
        num_samples: draws of x.
        doubt: why the error is not to be trusted; ``None``: nothing speaks against it.
        bias: why even many draws would not give the Z of the parts' true densities.

    Example:
        >>> Partition(-1.0, 0.1, "importance", 90.0, 0.2, 100).describe()
        'log Z = -1.000 ± 0.100 nats (importance, 100 draws, ESS 90, k-hat 0.20)'
    """

    value: float
    std_error: float
    method: Method
    ess: float = math.nan
    pareto_k: float = math.nan
    num_samples: int = 0
    doubt: str | None = None
    bias: str | None = None

    @property
    def reliable(self) -> bool:
        """Whether nothing speaks against the standard error."""
        return self.doubt is None

    @property
    def exact(self) -> bool:
        """Whether nothing was estimated."""
        return self.std_error == 0.0 and self.num_samples == 0

    def describe(self) -> str:
        """Return one line for people."""
        error = f"± {self.std_error:.3f} nats" if self.reliable else "nats, error unknown"
        words: list[str] = [self.method]
        if self.num_samples:
            words += [f"{self.num_samples} draws", f"ESS {self.ess:.0f}"]
            words += [f"k-hat {self.pareto_k:.2f}"]
        words += [note for note in (self.doubt, self.bias) if note]
        return f"log Z = {self.value:.3f} {error} ({', '.join(words)})"


class Proposals(NamedTuple):
    """Draws and what they weigh.

    Args:
        x: draws.  # (n, ...)
        log_weights: log of the product's density over the proposal's, up to log Z.  # (n,)
        table: log densities of the parts; a row of NaN where it cancels.  # (P, n)
        log_proposal: log density of the proposal; NaN where it cancels.  # (n,)
    """

    x: Tensor
    log_weights: Tensor
    table: Tensor
    log_proposal: Tensor


def check_proposal(product: Product, proposal: Proposal) -> list[int]:
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
    product: Product,
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
    return Proposals(x, log_weights, table, log_proposal)


def _counts(share: Tensor, count: int, independent: bool) -> Tensor:
    if independent:
        return torch.bincount(
            torch.multinomial(share, count, replacement=True), minlength=len(share)
        )
    edges = (share.cumsum(0) * count).round().long()
    return edges.diff(prepend=edges.new_zeros(1))


def estimate(
    product: Product,
    method: Method,
    *,
    proposal: Proposal | None = None,
    num_draws: int | None = None,
    num_samples: int | None = None,
    memory: float = 256.0,
    shares: Sequence[float] | None = None,
    num_temperatures: int = 100,
    inverse_temperatures: Tensor | None = None,
    steps: int = 1,
) -> Partition:
    """Estimate log Z by one method; see :meth:`Product.log_partition`."""
    if method == "exact":
        return enumerated(product)
    draws = num_draws or (2_000 if product.estimated else 10_000)
    options: dict[str, Any] = {"num_samples": num_samples, "memory": memory}
    if method == "importance":
        found = propose(product, draws, _or(proposal, "mixture"), shares=shares, **options)
        bias = _bias(product, _or(proposal, "mixture"))
        return from_weights(found.log_weights, "importance", bias)
    if method == "bridge":
        return _bridge(product, _or(proposal, product.samplers[0]), draws, options)
    if method == "ais":
        part = _or(proposal, product.samplers[0])
        schedule = inverse_temperatures
        if schedule is None:
            schedule = torch.linspace(0.0, 1.0, num_temperatures, dtype=torch.float64)
        return _annealed(product, part, num_draws or 500, schedule, steps, options)
    raise ValueError(f"Product.log_partition: method is {method!r}; use one of {METHODS}.")


def _or(proposal: Proposal | None, default: Proposal) -> Proposal:
    return default if proposal is None else proposal


def _bias(product: Product, proposal: Proposal) -> str | None:
    """Say where estimated densities make even the mean of the weights another number than Z."""
    estimated = product.estimated
    if not estimated:
        return None
    powers = product.powers.tolist()
    cancels = isinstance(proposal, int) and powers[proposal] == 1.0
    odd = [i for i in estimated if powers[i] != 1.0]
    in_proposal = not cancels and (
        proposal == "mixture" or (isinstance(proposal, int) and proposal in estimated)
    )
    if not odd and not in_proposal:
        return None
    why = "to a power other than 1" if odd else "in the proposal"
    return f"biased: estimated densities {why}"


def from_weights(log_weights: Tensor, method: Method, bias: str | None) -> Partition:
    """Average weights and judge the average by their tail."""
    mean = log_mean_exp(log_weights.double())
    count = len(log_weights)
    k = float(pareto_k(log_weights.double())) if count >= _PARETO_DRAWS else math.inf
    return Partition(
        value=float(mean.value),
        std_error=float(mean.std_error),
        method=method,
        ess=float(mean.ess),
        pareto_k=k,
        num_samples=count,
        doubt=doubt_of(k, count),
        bias=bias,
    )


def doubt_of(k: float, count: int) -> str | None:
    """Say why weights with such a tail cannot be averaged, or None."""
    if count < _PARETO_DRAWS:
        return f"{count} draws are too few to judge log Z"
    limit = good_k(count)
    if not k <= limit:
        return f"log Z not to be trusted: k-hat {k:.2f} > {limit:.2f}"
    return None


@torch.no_grad()
def state_table(product: Product) -> tuple[Tensor, Tensor]:
    """Return all states of a small product of bits and their log densities, up to log Z."""
    size = units(product.visible_shape)
    if product.support != "bits" or size > MAX_UNITS or product.estimated:
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


def search_table(product: Product, count: int, **options: Any) -> tuple[Tensor, Tensor, bool]:
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
    small = product.support == "bits" and units(product.visible_shape) <= MAX_UNITS
    if small and not product.estimated:
        states, _ = state_table(product)
        table = product.table(states)
        return table, torch.full_like(table[0], -math.log(len(states))), True
    found = propose(product, count, "mixture", **options)
    return found.table, found.log_proposal, False


def enumerated(product: Product) -> Partition:
    """Sum over all states."""
    return Partition(float(state_table(product)[1].logsumexp(0)), 0.0, "exact")


def _bridge(product: Product, part: Proposal, draws: int, options: dict[str, Any]) -> Partition:
    places = check_proposal(product, part)
    if part == "mixture":
        raise ValueError(
            f"Product.log_partition: a bridge leads to one part; give proposal=, one of {places}."
        )
    below = propose(product, draws, part, **options)
    few_bits = product.support == "bits" and units(product.visible_shape) <= _FEW
    chains = product.chains(
        method="gibbs" if few_bits and not product.estimated else "metropolis",
        num_chains=min(50, draws),
        num_draws=max(1, draws // min(50, draws)),
        **options,
    )
    worst = chains.r_hat_log_density
    x = chains.values.reshape(-1, *chains.values.shape[2:])
    skip = () if float(product.powers[part]) != 1.0 else (int(part),)
    table = product.table(x, skip=skip, **options)
    kept = [j for j in range(len(table)) if j not in skip]
    ratio = product.powers.to(table)[kept] @ table[kept]
    if not skip:
        ratio = ratio - table[int(part)]
    found = bridge_log_ratio(ratio, below.log_weights, effective=chains.ess_log_density)
    count = len(ratio) + len(below.log_weights)
    doubt = doubt_of(found.pareto_k, count)
    if not found.converged:
        doubt = "the bridge did not converge"
    if doubt is None and not worst <= _R_HAT:
        doubt = f"log Z not to be trusted: the chains have not mixed, R-hat {worst:.2f}"
    bias = "biased: estimated densities at both ends" if product.estimated else None
    return Partition(
        found.value, found.std_error, "bridge", found.ess, found.pareto_k, count, doubt, bias
    )


def _annealed(
    product: Product,
    part: Proposal,
    chains: int,
    schedule: Tensor,
    steps: int,
    options: dict[str, Any],
) -> Partition:
    check_proposal(product, part)
    if part == "mixture":
        raise ValueError(
            "Product.log_partition: a path starts at one part; give proposal=, one of "
            f"{product.samplers}."
        )
    place = int(part)
    state = draw_rows(product[place], chains)
    terms: Terms = partial(product.table, **options)
    found = annealed_path(
        state,
        terms,
        _flips(terms, steps, state) if product.support == "bits" else _walks(terms, steps, state),
        start=torch.eye(len(product), dtype=torch.float64)[place],
        end=product.powers,
        inverse_temperatures=schedule,
    )
    bias = "biased: estimated densities along the path" if product.estimated else None
    return from_weights(found.log_weights, "ais", bias)


def _flips(terms: Terms, steps: int, state: Tensor) -> Transition:
    """Return Gibbs transitions that draw single bits at sites drawn anew."""
    size = state[0].numel()

    def move(state: Tensor, held: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        sites = torch.randint(size, (steps,))
        walk = flip_gibbs(state, terms, coefficients, current=held, sites=sites)
        return walk.state, walk.terms

    return move


def _walks(terms: Terms, steps: int, state: Tensor) -> Transition:
    """Return Metropolis transitions whose steps are as wide as the part at the start."""
    scale = 2.4 / math.sqrt(state[0].numel()) * state.std(0).clamp_min(1e-3)

    def move(state: Tensor, held: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        for width in (1.0, 0.3):
            walk = random_walk(
                state, terms, coefficients, scale=width * scale, current=held, steps=steps
            )
            state, held = walk.state, walk.terms
        return state, held

    return move
