"""Multiplicative boosting: fit the parts of a product one after another, and their powers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pyroboost.compose.energy import Ratio
from pyroboost.compose.product import Product
from pyroboost.compose.rounds import check_tensors
from pyroboost.infer._product_rounds import RoundReport, Rounds
from pyroboost.infer.errors import check_composition, check_unweighted

__all__ = ["Multiplied", "RoundReport", "multiplicative"]


@dataclass(frozen=True)
class Multiplied:
    """A product boosted in rounds, and their reports.

    Args:
        product: the parts that were taken, with their powers; its log Z is up to date.
        rounds: one report per round that was run; parts that were left out are in theirs.
    """

    product: Product
    rounds: tuple[RoundReport, ...]

    def table(self) -> str:
        """Return the reports as a table for people, in nats per datum."""
        rows = [
            f"{'round':<18} {'ESS':>8} {'power':>6} {'gain':>16} {'k-hat':>6} {'seconds':>8}  "
            "verdict; log-likelihood"
        ]
        for r in self.rounds:
            name = f"{r.index}: {r.name}"
            gain = "" if r.index == 0 else f"{r.gain:.3f} ± {r.gain_error:.3f}"
            ess, k = ("" if math.isnan(v) else f"{v:.4g}" for v in (r.ess, r.pareto_k))
            rows.append(
                f"{name:<18} {ess:>8} {r.power:>6.3f} {gain:>16} {k:>6} {r.seconds:>8.1f}  "
                f"{r.verdict}; {r.held_out.describe()}"
            )
        return "\n".join(rows)

    __str__ = table


def multiplicative(
    product: Product,
    data: Tensor,
    *,
    validation: Tensor | None = None,
    betas: float | Sequence[float] = 1.0,
    alphas: float | Sequence[float] | None = None,
    max_power: float = 2.0,
    least: float = 0.1,
    start: int = 0,
    stages: Mapping[int, Mapping[str, Any]] | None = None,
    stop: bool = False,
    num_draws: int | None = None,
    weight_samples: int = 10,
    checkpoints: str | Path | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Multiplied:
    r"""Fit the parts of a product in rounds, each to what those before it leave unexplained.

    Round t of a density $m_t$: it is fitted to the data with weights
    $\propto \tilde q_{t-1}(x_n)^{-\beta_t}$. Round t of a :class:`Ratio`: its classifier is
    trained between data and draws of $q_{t-1}$. Then

    $$\log \tilde q_t = \log \tilde q_{t-1} + \alpha_t \log m_t, \qquad
    \alpha_t = \arg\max_\alpha \frac1N \sum_n \log \tilde q_t(x_n) - \log Z(\alpha)$$

    on held-out data where there are any. All of the search reads one set of draws of the parts,
    on which $\log Z(\alpha)$ is a log-mean-exp, so that the objective is concave in $\alpha$; a
    power at which Pareto k is too large is brought down until it is not.

    No power within [0, 1] lowers the mean log-likelihood of the data where
    $\mathbb{E}_{data} \log m_t \ge \log \mathbb{E}_{q_{t-1}} m_t$; with $\beta_t = 1$ that holds
    for the best $m_t$ of all, the ratio of data to $q_{t-1}$. A part whose gain is not above two
    standard errors is left out of the product and kept in its report, except where its power was
    given.

    Args:
        product: the parts, trained in place; of its powers the first is kept.
        data: training data.  # (N, ...)
        validation: held-out data, which choose the powers and judge.  # (M, ...)
        betas: exponents of the weights within [0, 1], for each round after the first.
        alphas: powers, for each round after the first; searched for where left out.
        max_power: largest power of the search.
        least: effective sample size of the data's weights at least, as a share of N; beta is
            lowered until it is reached.
        start: first round to be run; the parts before it keep their values and powers.
        stages: settings of :func:`fit` (or of the own algorithm) by round, over the common ones.
        stop: stop after the first round whose part is left out.
        num_draws: draws for log Z in each round (10,000; 2,000 where densities are estimated).
        weight_samples: importance samples per datum for the data's weights, of parts that do not
            know their density; likelihoods take ``product.num_samples``.
        checkpoints: folder of one checkpoint per round; the same call resumes from it.
        seed: seed of all random streams, by round; ``None`` draws from the global generators.
        **settings: common settings of :func:`fit`: ``epochs``, ``batch_size``, ``lr``, ...

    Returns:
        The product of the parts that were taken, and one report per round.

    Raises:
        TypeError: the data are not one tensor, or come with weights, or ``product`` is none.
        ValueError: options that name no round, or are out of their range.

    Example:
        >>> import torch
        >>> from pyroboost.models import BernoulliMixture
        >>> bits = (torch.rand(200, 4) < 0.5).float()
        >>> product = Product(BernoulliMixture(1, 4), BernoulliMixture(2, 4))
        >>> result = multiplicative(product, bits, seed=0)
        >>> [one.name for one in result.rounds], result.rounds[0].verdict
        (['BernoulliMixture', 'BernoulliMixture'], 'base')

    Reference:
        Grover and Ermon, Boosted generative models (2018), Algorithms 1 and 2, Theorems 1 and 2.
    """
    check_composition("multiplicative", product, Product)
    check_tensors(data, validation)
    options = dict(stages or {})
    check_unweighted("multiplicative", settings, *options.values())
    count = len(product)
    if not 0 <= start < count or not set(options) <= set(range(count)):
        raise ValueError(
            f"multiplicative: start={start} or stages={sorted(options)} names a round that the "
            f"product of {count} parts does not have; count from 0."
        )
    if isinstance(product[0], Ratio):
        raise ValueError(
            "multiplicative: the first part is a ratio, and there is no density before it that "
            "it could correct; put a density first."
        )
    if not max_power > 0:
        raise ValueError(f"multiplicative: max_power is {max_power}; take a positive number.")
    run = Rounds(
        product,
        data,
        validation,
        betas=_each(betas, count, "betas"),
        alphas=None if alphas is None else _each(alphas, count, "alphas"),
        max_power=max_power,
        least=least,
        num_draws=num_draws,
        weight_samples=weight_samples,
    )
    reports: list[RoundReport] = []
    for index in range(count):
        stream = None if seed is None else seed + index
        if index < start:
            run.take(product[index], float(product.powers[index]))
            continue
        own = {**settings, **options.get(index, {})}
        reports.append(run.round(index, own, checkpoints, stream))
        if stop and reports[-1].power == 0.0:
            break
    return Multiplied(run.current(), tuple(reports))


def _each(values: float | Sequence[float], count: int, name: str) -> list[float]:
    """Return one number per round; that of the first round is not used."""
    if isinstance(values, int | float):
        return [float(values)] * count
    if len(values) != count - 1:
        raise ValueError(
            f"multiplicative: {name} has {len(values)} entries; give one number, or one for each "
            f"of the {count - 1} rounds after the first."
        )
    return [math.nan, *map(float, values)]
