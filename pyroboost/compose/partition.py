"""Estimates of a product's log Z, each with its error and with what speaks against it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pyroboost.compose._proposals import (
    Proposal,
    Proposals,
    check_proposal,
    propose,
    search_table,
    state_table,
)
from pyroboost.compose.densities import draw_rows, units
from pyroboost.sampling import log_mean_exp
from pyroboost.sampling.bridge import bridge_log_ratio
from pyroboost.sampling.metropolis import flip_gibbs, random_walk
from pyroboost.sampling.paths import Terms, Transition, annealed_path
from pyroboost.sampling.psis import good_k, pareto_k

if TYPE_CHECKING:
    from pyroboost.compose._factors import Factors
    from pyroboost.compose._sampled import Sampled

__all__ = [
    "METHODS",
    "Method",
    "Partition",
    "Proposal",
    "Proposals",
    "estimate",
    "propose",
    "search_table",
]

Method = Literal["closed form", "exact", "importance", "bridge", "ais"]
METHODS: tuple[Method, ...] = ("closed form", "exact", "importance", "bridge", "ais")

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


def estimate(
    product: Sampled,
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
    if num_draws is not None and num_draws < 1:
        raise ValueError(
            f"Product.log_partition: num_draws is {num_draws}; ask for at least one draw."
        )
    draws = num_draws or (2_000 if product.estimated else 10_000)
    options: dict[str, Any] = {"num_samples": num_samples, "memory": memory}
    if method == "importance":
        found = propose(product, draws, _or(proposal, "mixture"), shares=shares, **options)
        bias = _bias(product, _or(proposal, "mixture"))
        result = from_weights(found.log_weights, "importance", bias)
        return with_constants(result, product, found.responsibilities())
    if method == "bridge":
        part = _or(proposal, product.samplers[0])
        return with_constants(_bridge(product, part, draws, options), product, {part: 1.0})
    if method == "ais":
        part = _or(proposal, product.samplers[0])
        schedule = inverse_temperatures
        if schedule is None:
            schedule = torch.linspace(0.0, 1.0, num_temperatures, dtype=torch.float64)
        result = _annealed(product, part, num_draws or 500, schedule, steps, options)
        return with_constants(result, product, {part: 1.0})
    raise ValueError(f"Product.log_partition: method is {method!r}; use one of {METHODS}.")


def with_constants(found: Partition, product: Factors, shares: Mapping[Any, float]) -> Partition:
    r"""Add what the proposing parts do not know of their own log Z.

    A part whose density is off by a factor c draws from its true law all the same, so that weights
    with it in the denominator have the mean $Z / c$; in the numerator c cancels.

    Args:
        found: an estimate as if the parts' constants were known.
        product: the product.
        shares: for each proposing part, its share of the denominator under the product.
    """
    errors = [share * product[part].normalisation()[1] for part, share in shares.items()]
    total = math.hypot(*errors)
    if total == 0.0:
        return found
    doubt = found.doubt
    if doubt is None and not math.isfinite(total):
        doubt = "log Z not to be trusted: that of a proposing part is in doubt"
    return replace(found, std_error=math.hypot(found.std_error, total), doubt=doubt)


def _or(proposal: Proposal | None, default: Proposal) -> Proposal:
    return default if proposal is None else proposal


def _bias(product: Factors, proposal: Proposal) -> str | None:
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


def enumerated(product: Factors) -> Partition:
    """Sum over all states."""
    return Partition(float(state_table(product)[1].logsumexp(0)), 0.0, "exact")


def _bridge(product: Sampled, part: Proposal, draws: int, options: dict[str, Any]) -> Partition:
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
    product: Factors,
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
