"""The decomposed bound of a cascade: what each stage adds, with errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroboost.compose import Cascade
from pyroboost.contexts import service
from pyroboost.evaluation.weights import (
    Draw,
    bound_draw,
    resampled_draw,
    row_blocks,
    take_rows,
)
from pyroboost.likelihood import Kind, weakest
from pyroboost.metamodel import MetaModel

__all__ = ["Decomposition", "Term", "decompose"]


@dataclass(frozen=True)
class Term:
    r"""One term of the bound: what stage i adds.

    Args:
        name: the stage.
        per_datum: $L_i$ of each datum from single samples (for a stage with ``num_particles`` K,
            from its own bound), averaged over draws, in nats.  # (N,)
        tight_per_datum: the same with K importance samples or an exact density.  # (N,)
        kind: bound, or estimate where a log Z is estimated.
        shared_error: standard error in nats of the two log Z estimates in the term.
        own_error: that of the stage's own log Z, the only one left in the sum up to this term.
    """

    name: str
    per_datum: Tensor
    tight_per_datum: Tensor
    kind: Kind
    shared_error: float
    own_error: float

    @property
    def value(self) -> float:
        """Mean of the term over data, in nats."""
        return float(self.per_datum.double().mean())

    @property
    def std_error(self) -> float:
        """Standard error of :attr:`value`."""
        return _error(self.per_datum, self.shared_error)

    @property
    def tight(self) -> float:
        """Mean of the importance-weighted term over data, in nats."""
        return float(self.tight_per_datum.double().mean())

    @property
    def tight_error(self) -> float:
        """Standard error of :attr:`tight`."""
        return _error(self.tight_per_datum, self.shared_error)


def _error(values: Tensor, shared: float) -> float:
    n = values.numel()
    return math.hypot(float(values.double().std()) / math.sqrt(n) if n > 1 else math.nan, shared)


@dataclass(frozen=True)
class Decomposition:
    r"""The terms $L_1, \dots, L_k$ of a cascade's bound and their sums.

    Args:
        terms: one per stage, bottom first.
        num_samples: draws of the chain per datum.
        num_importance: importance samples K of the tighter terms.
    """

    terms: tuple[Term, ...]
    num_samples: int
    num_importance: int

    @property
    def elbo(self) -> float:
        """Sum of the terms: the ELBO of the composed pair, in nats per datum.

        Where a stage has ``num_particles`` K > 1 it is another bound on log p(x).
        """
        return float(self.per_datum.double().mean())

    @property
    def per_datum(self) -> Tensor:
        """ELBO of the composed pair for each datum, (N,)."""
        return torch.stack([term.per_datum for term in self.terms]).sum(0)

    @property
    def elbo_error(self) -> float:
        """Standard error of :attr:`elbo`."""
        return _error(self.per_datum, self.terms[-1].own_error)

    @property
    def tight(self) -> float:
        """Sum of the tighter terms: a bound between the ELBO and log p(x), in nats per datum."""
        return sum(term.tight for term in self.terms)

    @property
    def tight_error(self) -> float:
        """Standard error of :attr:`tight`."""
        total = torch.stack([term.tight_per_datum for term in self.terms]).sum(0)
        return _error(total, self.terms[-1].own_error)

    def partial_sums(self) -> list[tuple[float, float]]:
        """Return the bound of the first i stages and its standard error, for i = 1, ..., k."""
        sums = torch.stack([term.per_datum for term in self.terms]).cumsum(0)
        return [
            (float(s.double().mean()), _error(s, term.own_error))
            for s, term in zip(sums, self.terms, strict=True)
        ]

    def table(self) -> str:
        """Return the terms as a table for people."""
        k = f"K={self.num_importance}"
        rows = [f"{'stage':<24} {'L_i':>10} {'± SE':>7}   {k:>10} {'± SE':>7}  kind"]
        rows += [
            f"{t.name:<24} {t.value:>10.3f} {t.std_error:>7.3f}   "
            f"{t.tight:>10.3f} {t.tight_error:>7.3f}  {t.kind}"
            for t in self.terms
        ]
        rows.append(
            f"{'sum':<24} {self.elbo:>10.3f} {self.elbo_error:>7.3f}   "
            f"{self.tight:>10.3f} {self.tight_error:>7.3f}"
        )
        return "\n".join(rows)

    __str__ = table


def _climb_once(cascade: Cascade, x: Tensor, args: tuple[Any, ...]) -> list[Draw]:
    drawn = []
    for stage, own in zip(cascade, cascade.stage_args(args), strict=True):
        drawn.append(bound_draw(stage, x, *own))
        x = drawn[-1].hidden
    return drawn


def _terms(log_weights: list[Tensor], log_priors: list[Tensor]) -> Tensor:
    """Return $L_i$ = log weight of stage i minus log prior of the stage below, (k, N)."""
    below = [torch.zeros_like(log_weights[0]), *log_priors[:-1]]
    return torch.stack([w - p for w, p in zip(log_weights, below, strict=True)])


def _climb_resampled(cascade: Cascade, x: Tensor, args: tuple[Any, ...], k: int) -> Tensor:
    """Climb by the self-normalised law of K draws per stage, (k, N)."""
    bounds, priors = [], []
    for index, (stage, own) in enumerate(zip(cascade, cascade.stage_args(args), strict=True)):
        known = _exact(stage, x, own) if index == len(cascade) - 1 else None
        if known is not None:
            bounds.append(known)
            priors.append(torch.zeros_like(known))
            break
        drawn = resampled_draw(stage, x, *own, num_samples=max(k, stage.num_particles))
        bounds.append(drawn.log_weight)
        priors.append(drawn.log_prior)
        x = drawn.hidden
    return _terms(bounds, priors)


def _exact(stage: MetaModel, x: Tensor, args: tuple[Any, ...]) -> Tensor | None:
    with service(stage):
        known = stage.log_marginal(x, *args)
    return known.value if known is not None and known.kind in ("exact", "estimate") else None


def decompose(
    cascade: Cascade,
    x: Tensor,
    *args: Any,
    num_samples: int = 1,
    num_importance: int = 10,
    memory: float = 256.0,
) -> Decomposition:
    r"""Split the bound of a cascade into what each stage adds.

    $$\log p(x) \ge \sum_{i=1}^k L_i, \qquad L_1 = \mathbb{E}_q \log \frac{m_1(x, h_1)}{q(h_1
    \mid x)}, \qquad L_i = \mathbb{E}_q \Big[ \log \frac{m_i(h_{i-1}, h_i)}{q(h_i \mid h_{i-1})} -
    \log m_{i-1}(h_{i-1}) \Big]$$

    With an exact guide, $L_1 = \log m_1(x)$ and $L_i$ is Eq. 6 of the paper; otherwise each
    marginal likelihood stands with its own bound, and on shared samples the terms sum to the ELBO
    of the composed pair. The tighter terms use K importance samples per stage, or the exact
    density of the top stage; they climb by the self-normalised law of those samples, without
    which their sum would not be a bound.

    **Stages with a bound of their own.** For a stage with ``num_particles`` K > 1, such as an
    IWAE, $L_i$ holds its own bound $\log \frac1K \sum_k w_k$, and $q(h_i \mid h_{i-1})$ is the
    self-normalised law that goes with it: one of K draws from the guide, kept in proportion to
    $w_k$. At that draw $\log m_i(h_i)$ is taken, and from it the stage above goes on, in training
    as well. The sum is no longer the composed pair's ELBO; it is at most $\log p(x)$ and, where
    one such stage stands at the bottom, at most the composed pair's importance-weighted bound
    with that K (:func:`resampled_draw` says why).

    For a stage with private latents, such as an LVAE, $h_i$ is its hidden site alone, the topmost
    latent: $\log m_i(h_i)$ is that site's prior, and the private sites stay within the stage's
    weight, $m_i(h_{i-1}, z, h_i) / q(z, h_i \mid h_{i-1})$.

    Args:
        cascade: the cascade.
        x: data.  # (N, ...)
        *args: further arguments of the cascade.
        num_samples: draws of the chain per datum.
        num_importance: importance samples K of the tighter terms.
        memory: bound on the working memory, in MiB.

    Returns:
        The terms with their errors, in nats per datum.

    Raises:
        ValueError: a log Z is unknown or stale; the sentence says what to call.

    Example:
        >>> from pyroboost.models import GMM, VAE
        >>> found = decompose(Cascade(VAE(6, 2, units=8), GMM(3, 2)), torch.zeros(5, 6))
        >>> len(found.terms), found.terms[0].kind
        (2, 'bound')

    Reference:
        Cascaded meta-models, Theorem 1.
    """
    if num_samples < 1 or num_importance < 1 or len(x) < 1:
        raise ValueError(
            f"decompose: {num_samples} samples, K = {num_importance}, {len(x)} data; each must be "
            "at least one."
        )
    singles: dict[int, list[Tensor]] = {}
    tights: dict[int, list[Tensor]] = {}
    copies = max(num_samples, num_importance)
    for rows, _ in row_blocks(cascade, x, args, copies, memory):
        if rows.start in singles:
            continue
        block, *own = take_rows((x, *args), rows, len(x))
        found = [_climb_once(cascade, block, tuple(own)) for _ in range(num_samples)]
        terms = [_terms([d.log_weight for d in f], [d.log_prior for d in f]) for f in found]
        singles[rows.start] = [torch.stack(terms).mean(0)]
        tights[rows.start] = [_climb_resampled(cascade, block, tuple(own), num_importance)]
    single = torch.cat([v[0] for _, v in sorted(singles.items())], dim=1)
    tight = torch.cat([v[0] for _, v in sorted(tights.items())], dim=1)
    return _assemble(cascade, single, tight, num_samples, num_importance)


def _assemble(cascade: Cascade, single: Tensor, tight: Tensor, s: int, k: int) -> Decomposition:
    constants = [stage.normalisation() for stage in cascade]
    terms = []
    for i, stage in enumerate(cascade):
        kinds = [constants[i][0], constants[i - 1][0] if i else "exact"]
        errors = [constants[i][1], constants[i - 1][1] if i else 0.0]
        terms.append(
            Term(
                name=f"{i}: {type(stage).__name__}",
                per_datum=single[i],
                tight_per_datum=tight[i],
                kind=weakest("bound", *kinds),
                shared_error=math.hypot(*errors),
                own_error=constants[i][1],
            )
        )
    return Decomposition(tuple(terms), s, k)
