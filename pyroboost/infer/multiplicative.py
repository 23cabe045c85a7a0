"""Multiplicative boosting: fit the parts of a product one after another, and their powers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyroboost.compose.densities import combined, log_density_of, normalised
from pyroboost.compose.energy import Ratio
from pyroboost.compose.partition import doubt_of, search_table
from pyroboost.compose.product import Product
from pyroboost.compose.rounds import check_tensors, contrast, ess_of, reweighted
from pyroboost.contexts import forked_rng
from pyroboost.infer.greedy import train_round
from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel, Round
from pyroboost.sampling import log_mean_exp
from pyroboost.sampling.psis import pareto_k

__all__ = ["Multiplied", "RoundReport", "multiplicative"]

RoundVerdict = Literal["base", "grows", "nothing gained", "worse", "in doubt"]

_PARETO_DRAWS = 25
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class RoundReport:
    """What happened in one round.

    Args:
        index: the round, from 0.
        name: the class of its part.
        part: the part, trained, whether or not it was taken into the product.
        beta: exponent of the data's weights; NaN where there were none.
        ess: effective sample size of the weights of the training data; NaN likewise.
        power: its power; 0 where it was left out.
        gain: what it adds to the mean log-likelihood of the data that chose the power, in nats.
        gain_error: standard error of that, over data and draws.
        held_out: log-likelihood of the product so far on held-out data, or on the training data
            where there are none, with its kind and its doubts.
        pareto_k: Pareto k of the weights for log Z; NaN where it is exact.
        verdict: what the round brought.
        fit: the fit, or the result of the part's own algorithm.
        seconds: time of the round.
    """

    index: int
    name: str
    part: MetaModel = field(repr=False)
    beta: float
    ess: float
    power: float
    gain: float
    gain_error: float
    held_out: Likelihood = field(repr=False)
    pareto_k: float
    verdict: RoundVerdict
    fit: Any = field(repr=False)
    seconds: float = 0.0


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
        TypeError: the data are not one tensor.
        ValueError: options that name no round, or are out of their range.

    Example:
        >>> from pyroboost.models import BernoulliMixture
        >>> bits = (torch.rand(200, 4) < 0.5).float()
        >>> product = Product(BernoulliMixture(1, 4), BernoulliMixture(2, 4))
        >>> result = multiplicative(product, bits, seed=0)
        >>> [one.name for one in result.rounds], result.rounds[0].verdict
        (['BernoulliMixture', 'BernoulliMixture'], 'base')

    Reference:
        Grover and Ermon, Boosted generative models (2018), Algorithms 1 and 2, Theorems 1 and 2.
    """
    check_tensors(data, validation)
    options = dict(stages or {})
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
    run = _Rounds(
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


class _Rounds:
    """The product so far, and the log densities that its rounds share."""

    def __init__(
        self, product: Product, data: Tensor, validation: Tensor | None, **options: Any
    ) -> None:
        self.product, self.data, self.validation = product, data, validation
        self.options = options
        self.parts: list[MetaModel] = []
        self.powers: list[float] = []
        self.judged: list[Likelihood] = []  # of the data that choose and judge, per part
        self.weighed: Tensor | None = None  # log density of the training data so far
        self.held_out: Tensor | None = None
        self.kept: Product | None = None

    @property
    def judges(self) -> Tensor:
        """The data that choose powers and judge."""
        return self.data if self.validation is None else self.validation

    def current(self, *more: MetaModel, powers: Sequence[float] = ()) -> Product:
        """Return the product so far, or with further parts."""
        if not more and self.kept is not None:
            return self.kept
        return Product(
            *self.parts,
            *more,
            powers=[*self.powers, *powers],
            num_samples=self.product.num_samples,
        )

    def density(self, part: MetaModel, x: Tensor, num_samples: int) -> Likelihood:
        """Return log densities of a part."""
        return log_density_of(part, x, num_samples=num_samples)

    def take(self, part: MetaModel, power: float, judged: Likelihood | None = None) -> Product:
        """Take a part into the product, whose log Z is then brought up to date."""
        part.refresh()
        few, many = self.options["weight_samples"], self.product.num_samples
        if len(self.parts) + 1 < len(self.product):
            seen = power * self.density(part, self.data, few).value.double()
            self.weighed = seen if self.weighed is None else self.weighed + seen
            if self.validation is not None:
                rows = power * self.density(part, self.validation, few).value.double()
                self.held_out = rows if self.held_out is None else self.held_out + rows
        if judged is None:
            judged = self.density(part, self.judges, many)
        self.judged.append(judged)
        self.kept = self.current(part, powers=[power])
        self.parts.append(part)
        self.powers.append(power)
        draws = self.options["num_draws"]
        self.kept.log_partition(**({} if draws is None else {"num_draws": draws}))
        return self.kept

    def problem(self, index: int) -> tuple[Round, float]:
        """Return what the part of this round is to be fitted to, and its beta."""
        part = self.product[index]
        name = f"{index}.{type(part).__name__}"
        if index == 0:
            return Round(part, self.data, self.validation, name), math.nan
        if isinstance(part, Ratio):
            return contrast(self.current(), part, name, self.data, self.validation), math.nan
        assert self.weighed is not None
        return reweighted(
            part,
            name,
            self.data,
            self.validation,
            log_density=self.weighed,
            validation_log_density=self.held_out,
            beta=self.options["betas"][index],
            least=self.options["least"],
        )

    def round(
        self, index: int, settings: dict[str, Any], checkpoints: Any, seed: int | None
    ) -> RoundReport:
        """Fit one part, find its power, and take it or leave it."""
        began = time.perf_counter()
        part = self.product[index]
        with forked_rng(seed):
            item, beta = self.problem(index)
        result = train_round(index, item, settings, checkpoints, seed)
        with forked_rng(seed):
            part.refresh()
            found = self.density(part, self.judges, self.product.num_samples)
            first = float(self.product.powers[0])
            choice = _Choice(first, 0.0, 0.0, False) if index == 0 else self.choose(index, found)
            verdict = "base" if index == 0 else choice.verdict
            given = self.options["alphas"] is not None
            taken = index == 0 or verdict == "grows" or given
            if taken:
                self.take(part, choice.power, found)
            product = self.current()
            partition = product.partition
            held_out = normalised(combined(self.judged, self.powers), partition)
        return RoundReport(
            index=index,
            name=type(part).__name__,
            part=part,
            beta=beta,
            ess=ess_of(item.weights),
            power=choice.power if taken else 0.0,
            gain=choice.gain,
            gain_error=choice.error,
            held_out=held_out,
            pareto_k=partition.pareto_k,
            verdict=verdict,
            fit=result,
            seconds=time.perf_counter() - began,
        )

    def choose(self, index: int, found: Likelihood) -> _Choice:
        """Search for the power of a part on one set of draws."""
        part = self.product[index]
        alphas = self.options["alphas"]
        with_part = self.current(part, powers=[1.0])
        draws = self.options["num_draws"] or (2_000 if with_part.estimated else 10_000)
        table, log_proposal, summed = search_table(with_part, draws)
        powers = torch.tensor(self.powers, dtype=table.dtype, device=table.device)
        before = powers @ table[:-1] - log_proposal
        search = _Search(before, table[-1], found.value.to(table), summed)
        if alphas is not None:
            return search.at(alphas[index])
        return search.best(self.options["max_power"])


@dataclass(frozen=True)
class _Choice:
    """A power, what it gains with which error, and whether log Z there is in doubt."""

    power: float
    gain: float
    error: float
    doubted: bool

    @property
    def verdict(self) -> RoundVerdict:
        """Say what the gain means, at two standard errors."""
        if self.doubted:
            return "in doubt"
        if self.gain > 2 * self.error and self.gain > 0:
            return "grows"
        return "nothing gained" if self.gain >= -2 * self.error else "worse"


class _Search:
    """The gain of a power, on one set of draws and of data.

    Args:
        before: log weights of the draws under the product so far.  # (n,)
        new: log density of the new part at the draws.  # (n,)
        data: the same at the data.  # (N,)
        summed: whether the draws are all states, each once, so that log Z is exact.
    """

    def __init__(self, before: Tensor, new: Tensor, data: Tensor, summed: bool) -> None:
        self.before, self.new, self.data, self.summed = before, new, data.double(), summed

    def gain(self, alpha: float) -> float:
        """Return by how much the mean log-likelihood exceeds that at 0."""
        change = log_mean_exp(self.before + alpha * self.new).value
        change = change - log_mean_exp(self.before).value
        return float(alpha * self.data.mean() - change)

    def at(self, alpha: float) -> _Choice:
        """Return the gain at a power with its error and its doubt."""
        if not alpha > 0:
            raise ValueError(f"multiplicative: alphas hold {alpha}; powers are positive.")
        # What each draw does to log Z(alpha) - log Z(0), by the delta method.
        change = (self.before + alpha * self.new).softmax(0) - self.before.softmax(0)
        spread = 0.0 if self.summed else float(change.std()) * math.sqrt(len(change))
        over_data = alpha * float(self.data.std()) / math.sqrt(len(self.data))
        # Densities that are equal but for rounding must not pass for a gain or a loss.
        rounding = 1e-7 * max(1.0, alpha * float(self.data.abs().mean()))
        error = math.hypot(spread, over_data, rounding)
        return _Choice(alpha, self.gain(alpha), error, self.doubted(alpha))

    def doubted(self, alpha: float) -> bool:
        """Tell whether Pareto k at this power is too large."""
        if self.summed:
            return False
        weights = self.before + alpha * self.new
        k = float(pareto_k(weights)) if len(weights) >= _PARETO_DRAWS else math.inf
        return doubt_of(k, len(weights)) is not None

    def best(self, largest: float) -> _Choice:
        """Return the power that gains most, brought down to where log Z can be trusted."""
        low, high = 0.0, largest
        for _ in range(60):
            left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            low, high = (low, right) if self.gain(left) >= self.gain(right) else (left, high)
        alpha = max(0.5 * (low + high), 1e-6)
        alpha = largest if self.gain(largest) >= self.gain(alpha) else alpha
        for _ in range(20):
            if not self.doubted(alpha):
                break
            alpha *= 0.7
        return self.at(alpha)
