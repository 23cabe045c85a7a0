"""The rounds of multiplicative boosting and their reports."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyroboost.compose._proposals import search_table
from pyroboost.compose.densities import combined, log_density_of, normalised
from pyroboost.compose.energy import Ratio
from pyroboost.compose.product import Product
from pyroboost.compose.rounds import contrast, ess_of, reweighted
from pyroboost.contexts import forked_rng
from pyroboost.infer._power_search import Choice, RoundVerdict, Search
from pyroboost.infer._stage_fit import train_round
from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel, Round

__all__ = ["RoundReport", "Rounds"]


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


class Rounds:
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
            choice = Choice(first, 0.0, 0.0, False) if index == 0 else self.choose(index, found)
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

    def choose(self, index: int, found: Likelihood) -> Choice:
        """Search for the power of a part on one set of draws."""
        part = self.product[index]
        alphas = self.options["alphas"]
        with_part = self.current(part, powers=[1.0])
        draws = self.options["num_draws"] or (2_000 if with_part.estimated else 10_000)
        table, log_proposal, summed = search_table(with_part, draws)
        powers = torch.tensor(self.powers, dtype=table.dtype, device=table.device)
        before = powers @ table[:-1] - log_proposal
        search = Search(before, table[-1], found.value.to(table), summed)
        if alphas is not None:
            return search.at(alphas[index])
        return search.best(self.options["max_power"])
