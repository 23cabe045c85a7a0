"""How good a guide is as a posterior: what its importance weights can tell, with errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyroboost.evaluation import _traces as tr
from pyroboost.evaluation._together import runs
from pyroboost.evaluation.weights import log_weights
from pyroboost.likelihood import Kind, weakest
from pyroboost.sampling import effective_sample_size, log_mean_exp
from pyroboost.sampling.psis import good_k, psis

__all__ = ["Estimate", "PosteriorQuality", "judge", "posterior_quality"]


@dataclass(frozen=True)
class Estimate:
    """A mean over data and its standard error, in nats.

    Args:
        value: the mean.
        std_error: its standard error: over data where there are several, else over draws.
        per_datum: the values.  # (N,)
    """

    value: float
    std_error: float
    per_datum: Tensor = field(repr=False)

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.std_error:.3f}"


@dataclass(frozen=True)
class PosteriorQuality:
    r"""What importance weights $w = m(x, h) / q(h \mid x)$ tell of a guide.

    Args:
        log_weights: log weights, (S, N); N is 1 where all data share hidden values.
        pareto_k: $\hat k$ of each datum.  # (N,)
        ess: effective sample size of each datum.  # (N,)
        joint_pareto_k: $\hat k$ of all data taken together: of $\prod_n w_n$.
        joint_ess: effective sample size of the same.
        elbo: mean of $\log w$ over draws.
        importance_bound: log of the mean of w over the S draws.
        gap: importance-weighted bound minus ELBO, on the same draws.
        kind: what the two are: bounds, or estimates where a log Z is estimated.
        shared: whether all data share hidden values and are judged as one.
    """

    log_weights: Tensor = field(repr=False)
    pareto_k: Tensor
    ess: Tensor
    joint_pareto_k: float
    joint_ess: float
    elbo: Estimate
    importance_bound: Estimate
    gap: Estimate
    kind: Kind
    shared: bool

    @property
    def num_samples(self) -> int:
        """Draws per datum."""
        return len(self.log_weights)

    @property
    def good_k(self) -> float:
        """The largest k at which this many draws can be reweighted."""
        return good_k(self.num_samples)

    def describe(self) -> str:
        """Say in words what the numbers are and what they cannot tell."""
        n, s = self.pareto_k.numel(), self.num_samples
        each = "as one" if self.shared else "each"
        name = {"bound": "importance-weighted bound"}.get(self.kind, f"importance {self.kind}")
        lines = [
            f"Posterior quality of {'all data' if self.shared else f'{n} data'}, judged {each} by "
            f"{s} draws of the guide (nats per {'data set' if self.shared else 'datum'}).",
            f"ELBO {self.elbo}; {name} {self.importance_bound}; gap {self.gap}: on average no more "
            "than KL(q || p), what the ELBO loses by the guide.",
            self._tails(n),
            f"ESS: median {_median(self.ess):.0f} of {s}, least {float(self.ess.min()):.0f}.",
        ]
        if not self.shared and n > 1:
            lines.append(
                f"All data as one: k-hat {self.joint_pareto_k:.2f}, ESS {self.joint_ess:.0f}; "
                "unless the guide is exact, these grow worse with the number of data."
            )
        return "\n".join([*lines, _SEES, _BLIND])

    def _tails(self, n: int) -> str:
        above, flat = (
            int((self.pareto_k > self.good_k).sum()),
            int((self.pareto_k == -math.inf).sum()),
        )
        median, largest = _median(self.pareto_k), float(self.pareto_k.max())
        text = (
            f"k-hat: median {median:.2f}, largest {largest:.2f}; "
            f"above {self.good_k:.2f}, the limit for this many draws, for {above} of {n}."
        )
        return text + (f" For {flat} of {n} the weights have no tail (-inf)." if flat else "")

    def __str__(self) -> str:
        return self.describe()

    def plot(self, ax: Any = None) -> Any:
        """Draw k-hat of each datum with its limits; return the ``Axes``."""
        from pyroboost.plotting import plot_khat

        return plot_khat(self.pareto_k, num_samples=self.num_samples, ax=ax)


_SEES = (
    "k-hat sees how heavy the tail of p / q is where the guide puts draws: above the limit, "
    "reweighting these draws (corrected averages, the importance-weighted bound, PSIS) cannot be "
    "relied on, while averages that are not reweighted may still serve."
)
_BLIND = (
    "ESS sees how many equal draws the weighted ones are worth for averages, if k-hat is below its "
    "limit. k-hat and ESS cannot see a mode or region that no draw reached, so a guide that misses "
    "one can have a small k-hat and a large ESS; nor do they say whether the model fits the data. "
    "Read them beside the gap and predictive checks."
)


def posterior_quality(
    pair: tr.Pair,
    data: Any,
    *args: Any,
    num_samples: int = 1000,
    visible: str | None = None,
    memory: float = 256.0,
    vectorized: bool = True,
) -> PosteriorQuality:
    r"""Judge a guide by its importance weights, datum by datum and as a whole.

    $$\mathrm{ELBO} = \mathbb{E}_q \log w \;\le\; \mathbb{E} \log \tfrac1S \sum_s w_s
    \;\le\; \log m(x), \qquad w = \frac{m(x, h)}{q(h \mid x)}$$

    A meta-model has one weight per datum. So has a (model, guide) whose every latent site is in
    the plate of the data; where data share hidden values, such as regression weights, they are
    judged as one.

    Args:
        pair: a meta-model, or any Pyro model and guide.
        data: first argument of both programs.  # (N, ...)
        *args: further arguments.
        num_samples: draws per datum S; k-hat of a joint posterior wants thousands.
        visible: the observed site that is the data; only for a (model, guide) with several.
        memory: bound on the working memory in MiB, for meta-models.
        vectorized: as in :func:`log_weights`, for meta-models.

    Returns:
        k-hat, ESS, the ELBO, the importance-weighted bound and their gap, in nats.

    Raises:
        ValueError: fewer than 25 draws, weights that are NaN, or a guide without a density.

    Example:
        >>> from pyroboost.models import GMM
        >>> quality = posterior_quality(GMM(3, 2), torch.randn(5, 2), num_samples=100)
        >>> quality.pareto_k.tolist(), quality.gap.value < 1e-4
        ([-inf, -inf, -inf, -inf, -inf], True)

    Reference:
        Yao, Vehtari, Simpson and Gelman, Yes, but did it work? (2018), section 3.
    """
    everything = (data, *args)
    item = tr.subject(pair, everything, visible, "posterior_quality")
    shared = False
    if item.pair is not None:
        next(tr.traced(item, everything, 1))  # refuses a guide without a density
        options: dict[str, Any] = {"memory": memory, "vectorized": vectorized}
        table = log_weights(item.pair, data, *args, num_samples=num_samples, **options)
    else:
        table, shared = _weights(item, everything, num_samples)
    return judge(table, item, shared)


def _weights(item: tr.Subject, args: Sequence[Any], count: int) -> tuple[Tensor, bool]:
    rows: list[Tensor] = []
    where: tr.Layout | None = None
    for run in runs(item, args, count):
        where = where or tr.layout(item, run, args)
        row = where.total(run.model, run.scored) - where.total(run.guide, list(run.guide))
        rows.append(row.reshape(-1))
    return torch.stack(rows), where is not None and not where.separate


def judge(table: Tensor, item: tr.Subject, shared: bool) -> PosteriorQuality:
    r"""Judge a guide by log weights that are at hand.

    Args:
        table: log weights, $\log m(x, h) - \log q(h \mid x)$, in nats.  # (S, N)
        item: the pair that they are of.
        shared: whether all data share hidden values; N is 1 then.
    """
    single, eps = psis(table).pareto_k, torch.finfo(table.dtype).eps
    table = table.double()
    # Constants of each datum do not matter, but their rounding would grow with the sum.
    joint = (table - table.mean(0)).sum(1)
    rounding = 32 * eps * float(table.abs().amax(0).clamp(min=1.0).square().sum().sqrt())
    mean, _, ess = log_mean_exp(table)
    elbo, ratio = table.mean(0), (table - mean).exp()
    constant, error = item.normalisation()
    return PosteriorQuality(
        log_weights=table,
        pareto_k=single,
        ess=ess,
        joint_pareto_k=float(psis(joint, tolerance=rounding).pareto_k),
        joint_ess=float(effective_sample_size(joint)),
        elbo=_estimate(elbo, table, error),
        importance_bound=_estimate(mean, ratio, error),
        gap=_estimate(mean - elbo, ratio - table, 0.0),
        kind=weakest("bound", constant),
        shared=shared,
    )


def _estimate(per_datum: Tensor, draws: Tensor, shared_error: float) -> Estimate:
    """Average over data; ``draws`` have the value's derivative by each draw, to first order."""
    if len(per_datum) > 1:
        error = float(per_datum.std()) / math.sqrt(len(per_datum))
    else:
        error = float(draws.std()) / math.sqrt(len(draws))
    return Estimate(float(per_datum.mean()), math.hypot(error, shared_error), per_datum)


def _median(values: Tensor) -> float:
    return float(values.sort().values[len(values) // 2])
