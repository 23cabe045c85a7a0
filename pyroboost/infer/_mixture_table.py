"""Stored log densities of draws from every component: the mixture's bound for any weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyroboost.sampling.psis import psis

__all__ = ["Measured", "Slopes", "Table", "gain", "joined"]


class Measured(NamedTuple):
    """A number and its standard error, in nats."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class Table:
    r"""Draws of each component, what the model says of them, and what every component says.

    With weights w the bound of the mixture is, draws being stratified over components,

    $$\mathcal{L}(w) = \sum_n \sum_c w_c\, \frac1S \sum_s \Big[\log p(x_n, z_{csn}) -
    \log \sum_j w_j\, g_j(z_{csn} \mid x_n)\Big].$$

    Args:
        joint: log p of the draws, less what other sites of the guide take.  # (K, S, N)
        scores: log densities of the draws under all components.  # (K, S, N, K)
        scale: what the site's log density is scaled by.  # (N)
        components: which components these are.
        over_data: whether the rows are data, over which errors are taken; else the draws are.
        paired: whether draws of all components share their noise, and errors are of their sum.
    """

    joint: Tensor
    scores: Tensor
    scale: Tensor
    components: tuple[int, ...]
    over_data: bool
    paired: bool = False

    def __post_init__(self) -> None:
        """Go on in double precision: differences of large log densities decide the weights."""
        for name in ("joint", "scores", "scale"):
            object.__setattr__(self, name, getattr(self, name).double())

    def gamma(self, weights: Tensor) -> Tensor:
        r"""Return $\gamma = \log q_w - \log p$ of all draws, scaled as the site, (K, S, N)."""
        return self.scale * self.mixed(weights) - self.joint

    def mixed(self, weights: Tensor) -> Tensor:
        """Return the mixture's log density of all draws, (K, S, N)."""
        return (self.scores + weights.to(self.scores).log()).logsumexp(-1)

    def terms(self, weights: Tensor) -> Tensor:
        """Return what each draw of each component adds to the bound, (K, S, N or 1)."""
        used = weights.to(self.joint) > 0
        values = -torch.where(used[:, None, None], self.gamma(weights), 0.0)
        values = weights.to(values)[:, None, None] * values
        return values if self.over_data else values.sum(-1, keepdim=True)

    def bound(self, weights: Tensor) -> Measured:
        """Return the bound: per datum over data, in total otherwise."""
        return _measured(self.terms(weights), self.over_data, self.paired)

    def slopes(self, weights: Tensor) -> Slopes:
        r"""Return $E_{g_c}[\gamma]$ of every component with errors: minus the bound's gradient.

        Up to a constant that is the same for all components.
        """
        values = self.gamma(weights)
        rows = values.mean(1) if self.over_data else values.sum(-1)
        return Slopes(rows.mean(-1), rows.std(-1) / math.sqrt(rows.shape[-1]), rows, self.over_data)

    def loss(self, weights: Tensor) -> tuple[float, Tensor]:
        """Return minus the bound of these very draws, and its derivative by every weight."""
        w = weights.to(self.joint).clamp(min=1e-12)
        mixed = (self.scores + w.log()).logsumexp(-1)
        shape = 1.0 / (self.joint.shape[1] * (self.joint.shape[2] if self.over_data else 1))
        own = (self.scale * mixed - self.joint).sum((1, 2)) * shape
        ratio = (self.scores - mixed.unsqueeze(-1)).exp() * self.scale.unsqueeze(-1)
        spread = (w[:, None, None, None] * ratio).sum((0, 1, 2)) * shape
        return float((w * own).sum()), own + spread

    def log_ratios(self, weights: Tensor) -> Tensor:
        """Return importance log weights of draws from the mixture, in proportion, (S', N or 1)."""
        count = self.joint.shape[1]
        values = -self.gamma(weights)
        counts = [round(float(w) * count) for w in weights]
        rows = torch.cat([values[c, :n] for c, n in enumerate(counts)])
        return rows if self.over_data else rows.sum(-1, keepdim=True)

    def pareto_k(self, weights: Tensor) -> float | None:
        """Return k-hat of the mixture, the median over data; ``None`` below 25 draws."""
        ratios = self.log_ratios(weights)
        if len(ratios) < 25:
            return None
        return float(psis(ratios).pareto_k.median())


class Slopes(NamedTuple):
    """Numbers and their standard errors, in nats, (K) each, with what they are means of, (K, R)."""

    value: Tensor
    error: Tensor
    rows: Tensor
    paired: bool

    def combined(self, shares: Tensor) -> Measured:
        """Return a sum of the numbers with given factors; over data its terms are paired."""
        shares = shares.to(self.value)
        total = float((shares * self.value).sum())
        if not self.paired:
            return Measured(total, float((shares * self.error).norm()))
        each = shares @ self.rows
        return Measured(total, float(each.std()) / math.sqrt(len(each)))


def _measured(terms: Tensor, over_data: bool, paired: bool) -> Measured:
    """Sum over components; take errors over data, or else over the draws of each component."""
    means = terms.mean(1)
    if over_data:
        rows = means.sum(0)
        error = float(rows.std()) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
        if len(rows) > 1:
            return Measured(float(rows.mean()), error)
    total = terms.sum(-1)
    spread = total.sum(0).var() if paired else total.var(1).sum()
    variance = spread / terms.shape[1]
    return Measured(float(means.sum()), float(variance.sqrt()))


def gain(after: Table, new: Tensor, before: Table, old: Tensor) -> Measured:
    """Return what the bound has gained, draw by draw or datum by datum.

    Args:
        after: the table of now.
        new: weights of now, by the components of ``after``.
        before: the table of before, whose draws come from the same noise.
        old: weights of before, by the components of ``before``.
    """
    terms = dict(zip(after.components, after.terms(new), strict=True))
    for c, t in zip(before.components, before.terms(old), strict=True):
        terms[c] = terms[c] - t if c in terms else -t
    return _measured(torch.stack(list(terms.values())), after.over_data, after.paired)


def joined(tables: Sequence[Table]) -> Table:
    """Put tables of several batches together."""
    first = tables[0]
    return Table(
        torch.cat([t.joint for t in tables], 2),
        torch.cat([t.scores for t in tables], 2),
        torch.cat([t.scale for t in tables]),
        first.components,
        first.over_data,
        first.paired,
    )
