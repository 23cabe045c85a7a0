"""The rounds of additive boosting: weights of data, a line search, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pyroboost.compose._line_search import Slope, best_weight, slope_at_zero, tempered
from pyroboost.compose.densities import in_blocks, sampled_density
from pyroboost.contexts import forked_rng, service
from pyroboost.likelihood import Kind, Likelihood, weakest
from pyroboost.metamodel import MetaModel, Round
from pyroboost.weights import take_rows

if TYPE_CHECKING:
    from pyroboost.compose.mixture import Mixture

__all__ = ["Growth", "Step", "density_of"]

Verdict = Literal["base", "grows", "nothing gained"]


@dataclass(frozen=True)
class Step:
    r"""What one round of additive boosting did; log-likelihoods are means per datum, in nats.

    Args:
        index: the part's place in the mixture.
        name: its class.
        weight: w of $q_t = (1 - w)\, q_{t-1} + w\, m_t$.
        beta: power of $1 / q_{t-1}$ in the weights of the data.
        ess: effective number of data that those weights leave.
        slope: the test of the part, $m_t / q_{t-1}$; ``None`` for the first part.
        before: log-likelihood of $q_{t-1}$.
        after: log-likelihood of $q_t$.
        gain: the one less the other.
        gain_error: its standard error, from the differences of the data.
        kind: what the log densities are.
        held_out: whether line search, test and likelihoods are those of held-out data.
        verdict: ``"base"``, ``"grows"`` or ``"nothing gained"``; in the last case w is 0.
    """

    index: int
    name: str
    weight: float
    beta: float
    ess: float
    slope: Slope | None
    before: float
    after: float
    gain: float
    gain_error: float
    kind: Kind
    held_out: bool
    verdict: Verdict


def density_of(
    pair: MetaModel, x: Tensor, args: tuple[Any, ...], num_samples: int, memory: float = 256.0
) -> Likelihood:
    """Return a pair's log density: what it knows, unless that is a bound, or an estimate.

    Args:
        pair: a meta-model.
        x: data.  # (N, ...)
        args: further arguments.
        num_samples: importance samples per datum, where they are needed.
        memory: bound on their working memory, in MiB.
    """
    with service(pair):
        first = pair.log_marginal(x[:1], *take_rows(args, slice(0, 1), len(x)))
        if first is not None and first.kind in ("exact", "estimate"):
            return in_blocks(pair.log_marginal, x, *args)
    return sampled_density(pair, x, *args, num_samples=num_samples, memory=memory)


@dataclass
class _Density:
    """Log density of the mixture so far at some data, and the variance of its estimate."""

    log_q: Tensor
    variance: Tensor

    @classmethod
    def of(cls, found: Likelihood) -> _Density:
        value = found.value.double()
        error = found.std_error
        own = torch.zeros_like(value) if error is None else error.double().nan_to_num(0.0).square()
        # The error of a constant is the same at all data: nothing averages it away.
        return cls(value, (own - found.shared_error**2).clamp_min(0.0))

    def mixed(self, other: _Density, w: float) -> _Density:
        """Return (1 - w) q + w m."""
        if w in (0.0, 1.0):
            return other if w else self
        terms = torch.stack([self.log_q + math.log1p(-w), other.log_q + math.log(w)], -1)
        shares = terms.softmax(-1).nan_to_num(0.0).square()
        variance = shares[:, 0] * self.variance + shares[:, 1] * other.variance
        return _Density(terms.logsumexp(-1), variance)

    @property
    def corrected(self) -> Tensor:
        """Log density without the bias of the logarithm of an estimate, half its variance."""
        return self.log_q + self.variance / 2


class Growth(Iterator[Round]):
    """The rounds of additive boosting of one mixture; what is done after a round is here.

    Args:
        mixture: the mixture; its weights are set after each round.
        data: a tensor, or a tuple of a tensor and further arguments.
        validation: held-out data likewise.
        start: first part to be trained; those before it keep their weights among themselves.
        ess: least effective fraction of the data.
        num_samples: importance samples per datum of a part that does not know its density.
        stop: end after the first part that gains nothing.
        seed: seed of the estimates.
    """

    def __init__(
        self,
        mixture: Mixture,
        data: Any,
        validation: Any = None,
        *,
        start: int = 0,
        ess: float = 0.1,
        num_samples: int = 20,
        stop: bool = True,
        seed: int | None = None,
    ) -> None:
        if not 0 <= start < len(mixture):
            raise ValueError(
                f"Mixture.rounds: start={start} names no part of {len(mixture)}; count from 0."
            )
        if not 0.0 <= ess < 1.0 or num_samples < 2:
            raise ValueError(
                f"Mixture.rounds: ess={ess}, num_samples={num_samples}; take a fraction of at "
                "least 0 and below 1, and at least 2 samples."
            )
        self.mixture, self.start, self.stop = mixture, start, stop
        self.ess, self.num_samples, self.seed = ess, num_samples, seed
        self.data, self.validation = _tensors(data, "data"), None
        self.raw, self.raw_validation = data, validation
        if validation is not None:
            self.validation = _tensors(validation, "validation")
        self.steps: list[Step] = []
        self._kind: Kind = "exact"
        self._run = self._rounds()

    def __next__(self) -> Round:
        return next(self._run)

    def _density(self, pair: MetaModel, data: tuple[Any, ...], index: int) -> _Density:
        with forked_rng(None if self.seed is None else self.seed + index):
            found = density_of(pair, data[0], data[1:], self.num_samples)
        self._kind = weakest(self._kind, found.kind)
        return _Density.of(found)

    def _both(self, pair: MetaModel, index: int) -> tuple[_Density, _Density]:
        """Return the densities at training data and at what is judged by."""
        train = self._density(pair, self.data, index)
        judged = self.validation
        return train, train if judged is None else self._density(pair, judged, index)

    def _rounds(self) -> Iterator[Round]:
        mixture, count = self.mixture, len(self.mixture)
        shares = mixture.weights.double()[: self.start]
        if self.start and not float(shares.sum()) > 0:
            raise ValueError(
                f"Mixture.rounds: the {self.start} parts before start have weight 0; set weights."
            )
        weights = torch.zeros(count, dtype=torch.float64)
        weights[: self.start] = shares / shares.sum() if self.start else shares
        q = judged = None
        for index in range(self.start, count):
            if index and q is None:
                mixture.weights = weights
                q, judged = self._both(mixture.kept(), index)
            pair, beta, ess = mixture[index], 0.0, float(len(self.data[0]))
            item = Round(pair, self.raw, self.raw_validation, f"{index}.{type(pair).__name__}")
            if q is not None and judged is not None:
                item, beta, ess = self._weigh(item, q, judged)
            yield item
            with forked_rng(self.seed):
                pair.refresh()
            m, judged_m = self._both(pair, index)
            step = self._judge(index, judged, judged_m, beta, ess)
            self.steps.append(step)
            weights *= 1.0 - step.weight
            weights[index] = step.weight
            mixture.weights = weights
            q = m if q is None else q.mixed(m, step.weight)
            judged = judged_m if judged is None else judged.mixed(judged_m, step.weight)
            if self.stop and step.verdict == "nothing gained":
                return

    def _weigh(self, item: Round, q: _Density, judged: _Density) -> tuple[Round, float, float]:
        """Give each datum the weight 1 / q, tempered where too few data would count."""
        found = tempered(q.log_q, self.ess)
        held_out = None
        if self.validation is not None:
            held_out = tempered(judged.log_q, 0.0, beta=found.beta).weights
        item = item._replace(weights=found.weights, validation_weights=held_out)
        return item, found.beta, found.ess

    def _judge(self, index: int, q: _Density | None, m: _Density, beta: float, ess: float) -> Step:
        """Search the part's weight on held-out data and say whether it helps."""
        verdict: Verdict = "base"
        slope, w = None, 1.0
        before = m if q is None else q
        after, gain = m, (0.0, 0.0)
        if q is not None:
            slope = slope_at_zero(q.log_q, m.log_q, q.variance)
            w = best_weight(q.log_q, m.log_q)
            after = q.mixed(m, w)
            gain = _paired(after.corrected - q.corrected)
            helps = w > 0.0 and (slope.positive or gain[0] > 2 * gain[1] > 0.0)
            verdict = "grows" if helps else "nothing gained"
            if not helps:
                w, after, gain = 0.0, q, (0.0, 0.0)
        return Step(
            index=index,
            name=type(self.mixture[index]).__name__,
            weight=w,
            beta=beta,
            ess=ess,
            slope=slope,
            before=float(before.corrected.mean()),
            after=float(after.corrected.mean()),
            gain=gain[0],
            gain_error=gain[1],
            kind=self._kind,
            held_out=self.validation is not None,
            verdict=verdict,
        )


def _paired(difference: Tensor) -> tuple[float, float]:
    finite = difference.nan_to_num(0.0)
    return float(finite.mean()), float(finite.std()) / math.sqrt(len(finite))


def _tensors(data: Any, name: str) -> tuple[Any, ...]:
    parts = data if isinstance(data, tuple) else (data,)
    if not parts or not all(isinstance(part, Tensor) for part in parts) or len(parts[0]) < 2:
        raise TypeError(
            f"Mixture.rounds: {name} is {type(data).__name__}; pass a tensor of at least 2 rows, "
            "or a tuple of such tensors, since each datum has a weight of its own."
        )
    return parts
