"""Boosting of flows on data: residual rounds, weights on the simplex, passes that settle them."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyroboost.compose._line_search import (
    Slope,
    best_weight,
    mean_and_error,
    slope_at_zero,
    tempered,
)
from pyroboost.infer.fit import Fit, fit
from pyroboost.infer.weighting import redrawn
from pyroboost.models._flow_report import FlowFit, FlowStep, Kind, Verdict
from pyroboost.models._flow_weights import log_mixture, nearest, solve_weights
from pyroboost.sampling import effective_sample_size

if TYPE_CHECKING:
    from pyroboost.models.flow_mixture import FlowMixture

__all__ = ["Growth", "Options"]

_ROWS = 4096  # of training data on which weights are solved between epochs of joint training


@dataclass(frozen=True)
class Options:
    """Settings of :meth:`FlowMixture.fit`, which explains them."""

    steps: int
    objective: Literal["mixture", "residual"]
    ess: float
    resample: bool
    attempts: int
    passes: int
    pass_steps: int
    joint_steps: int
    batch_size: int
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        least = {"steps": 1, "attempts": 1, "passes": 0, "pass_steps": 1, "joint_steps": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(
                    f"FlowMixture.fit: {name} is {getattr(self, name)}; take {low} or more."
                )
        if self.objective not in ("mixture", "residual"):
            raise ValueError(
                f"FlowMixture.fit: objective is {self.objective!r}; pass 'mixture' or 'residual'."
            )
        if not 0.0 <= self.ess < 1.0:
            raise ValueError(
                f"FlowMixture.fit: ess is {self.ess}; take a fraction of at least 0 and below 1."
            )


@dataclass(frozen=True)
class _Trial:
    """What was fitted, and how the data were weighed for it."""

    fits: tuple[Fit, ...]
    beta: float
    ess: float


@dataclass(frozen=True)
class _Verdict:
    """What was decided about a fit, and the weights that go with it."""

    words: Verdict
    helps: bool
    weights: Tensor
    slope: Slope | None = None
    gain: float = 0.0
    error: float = 0.0


class _Data:
    """Data with their weights, and the log densities of the components there."""

    def __init__(self, x: Tensor, weights: Tensor | None) -> None:
        self.x, self.weights = x, weights
        self.table: dict[int, Tensor] = {}

    def score(self, mixture: FlowMixture, which: list[int]) -> None:
        """Take the log densities of some components anew."""
        for c in which:
            value = mixture.component(c).log_marginal(self.x).value
            self.table[c] = value.detach().double()

    def mixed(self, weights: Tensor) -> Tensor:
        """Return the log density of the mixture at all data."""
        return log_mixture(self.table, weights)


class Growth:
    """Boosting of one mixture on data.

    Args:
        mixture: the mixture, trained in place.
        train: training data and their weights.
        held_out: held-out data and their weights; ``None``: training data decide.
        options: settings.
    """

    def __init__(
        self,
        mixture: FlowMixture,
        train: tuple[Tensor, Tensor | None],
        held_out: tuple[Tensor, Tensor | None] | None,
        options: Options,
    ) -> None:
        self.mixture, self.options = mixture, options
        self.train = _Data(*train)
        self.judge = self.train if held_out is None else _Data(*held_out)
        self.held_out = held_out is not None
        self.done: list[FlowStep] = []

    @property
    def active(self) -> list[int]:
        """The components of positive weight."""
        return self.mixture.components.flows.active

    def _score(self, which: list[int]) -> None:
        for data in {id(d): d for d in (self.train, self.judge)}.values():
            data.score(self.mixture, which)

    # The whole

    @torch.no_grad()
    def run(self, *, fresh: bool) -> FlowFit:
        """Grow the mixture, settle its components, and keep its start if that was better."""
        mixture, start = self.mixture, copy.deepcopy(self.mixture.state_dict())
        first = mean_and_error(mixture.log_marginal(self.judge.x).value, self.judge.weights)[0]
        if fresh:
            mixture.standardise_by(self.train.x, self.train.weights)
            self._try("round", 0)
        else:
            self._score(self.active)
        self._grow()
        for c in self.active * self.options.passes:
            if c in self.active and len(self.active) > 1:
                self._try("pass", c)
        if self.options.joint_steps:
            self._try("joint", None)
        last = mean_and_error(self.judge.mixed(mixture.weights), self.judge.weights)[0]
        kept = self.held_out and last < first
        if kept:
            mixture.load_state_dict(start)
        return FlowFit(tuple(self.done), self.held_out, kept)

    def _grow(self) -> None:
        """Add components until all are in use, or some starts in a row have gained nothing."""
        failures, count = 0, len(self.mixture.weights)
        for _ in range(2 * count):  # a component may be dropped again when later ones come
            idle = [c for c in range(count) if c not in self.active]
            if not idle or failures == self.options.attempts:
                return
            failures = 0 if self._try("round", idle[0]) else failures + 1

    def _try(self, kind: Kind, c: int | None) -> bool:
        """Make one fit, solve the weights, and keep both if they help."""
        mixture, judge, began = self.mixture, self.judge, time.perf_counter()
        state = copy.deepcopy(mixture.state_dict())
        tables, old = (dict(self.train.table), dict(judge.table)), mixture.weights.double()
        with torch.enable_grad():
            trial = self._round(_one(c), old) if kind == "round" else self._again(c)
        self._score(self.active if c is None else [c])
        verdict = self._decide(kind, c, old, tables[1])
        if verdict.helps:
            mixture.weights = verdict.weights
        else:
            mixture.load_state_dict(state)
            self.train.table = tables[0]
            judge.table = tables[1] if self.held_out else tables[0]
        after = mean_and_error(judge.mixed(mixture.weights.double()), judge.weights)[0]
        self.done.append(
            FlowStep(
                kind=kind,
                component=c,
                weights=tuple(mixture.weights.tolist()),
                beta=trial.beta,
                ess=trial.ess,
                slope=verdict.slope,
                after=after,
                gain=verdict.gain,
                gain_error=verdict.error,
                verdict=verdict.words,
                steps=sum(row["batches"] for one in trial.fits for row in one.history),
                seconds=time.perf_counter() - began,
                fits=trial.fits,
            )
        )
        return verdict.helps

    def _decide(
        self, kind: Kind, c: int | None, old: Tensor, table: Mapping[int, Tensor]
    ) -> _Verdict:
        """Solve the weights and say whether the fit helps."""
        judge, new = self.judge, old.clone()
        if not table:
            new.zero_()[_one(c)] = 1.0
            return _Verdict("base", True, new)
        before, slope = log_mixture(table, old), None
        if kind == "round":
            log_m = judge.table[_one(c)]
            slope = slope_at_zero(before, log_m, weights=judge.weights)
            w = best_weight(before, log_m, judge.weights)
            new *= 1 - w
            new[_one(c)] += w
        new = solve_weights(judge.table, new, judge.weights)
        gain, error = mean_and_error(judge.mixed(new) - before, judge.weights)
        if slope is None:
            helps = gain > 0.0
            return _Verdict("better" if helps else "put back", helps, new, None, gain, error)
        helps = bool(new[_one(c)] > 0) and (slope.positive or gain > 2 * error > 0.0)
        return _Verdict("grows" if helps else "nothing gained", helps, new, slope, gain, error)

    # One fit each

    def _round(self, c: int, old: Tensor) -> _Trial:
        """Fit a new component to what the others miss."""
        parts, train, judge = self.mixture.components, self.train, self.judge
        steps = self.options.steps
        parts.flows.restart(c)
        if not train.table:  # the first sees the data as they are
            found = self._fit_one(c, steps, train.weights, judge)
            return _Trial((found,), 0.0, _effective(train.weights, len(train.x)))
        drawn = tempered(train.mixed(old), self.options.ess, weights=train.weights)
        if self.options.objective == "residual":
            held = tempered(judge.mixed(old), 0.0, beta=drawn.beta, weights=judge.weights).weights
            found = self._fit_one(c, steps, drawn.weights, _Data(judge.x, held))
            return _Trial((found,), drawn.beta, drawn.ess)
        share = 0.5 / (len(self.active) + 1)
        mask = nearest(parts.standardise(train.x), drawn.weights, share)
        first = self._fit_one(c, max(1, steps // 2), drawn.weights * mask, None)
        with torch.no_grad():
            train.score(self.mixture, [c])
        w = max(best_weight(train.mixed(old), train.table[c], train.weights), share)
        new = (1 - w) * old
        new[c] += w
        self.mixture.weights = new
        second = self._fit_mixture([c], max(1, steps - steps // 2))
        return _Trial((first, second), drawn.beta, drawn.ess)

    def _again(self, c: int | None) -> _Trial:
        """Fit one component against all others, or all of them at once."""
        which, steps = self.active, self.options.joint_steps
        if c is not None:
            which, steps = [c], self.options.pass_steps
        found = self._fit_mixture(which, steps)
        return _Trial((found,), 0.0, _effective(self.train.weights, len(self.train.x)))

    def _fit_mixture(self, which: list[int], steps: int) -> Fit:
        """Fit some components by the likelihood of the whole mixture; the others do not move."""
        flows, train = self.mixture.components.flows.flows, self.train
        every = max(1, len(train.x) // _ROWS)
        shares = None if train.weights is None else train.weights[::every]
        weigh = partial(self._reweigh, train.x[::every], shares)
        still = [p for c, f in enumerate(flows) if c not in which for p in f.parameters()]
        asked = [p.requires_grad for p in still]
        try:
            for p in still:
                p.requires_grad_(False)
            return self._fit(self.mixture, steps, train.x, train.weights, self.judge, weigh)
        finally:
            for p, on in zip(still, asked, strict=True):
                p.requires_grad_(on)

    def _reweigh(self, x: Tensor, shares: Tensor | None, _state: Any) -> None:
        """Solve the weights between two epochs of joint training."""
        data = _Data(x, shares)
        with torch.no_grad():
            data.score(self.mixture, self.active)
        old = self.mixture.weights.double()
        new = solve_weights(data.table, old, shares, max_iterations=20, least=0.0)
        # A component in training is given a chance until its fit is judged.
        self.mixture.weights = torch.where(old > 0, new.clamp_min(1e-3), 0.0)

    def _fit_one(self, c: int, steps: int, weights: Tensor | None, held: _Data | None) -> Fit:
        """Fit one component to weighted data, or to data drawn anew by their weights."""
        x = self.train.x
        if self.options.resample:
            x, weights = redrawn(x, weights), None
        return self._fit(self.mixture.component(c), steps, x, weights, held)

    def _fit(
        self,
        pair: FlowMixture,
        steps: int,
        x: Tensor,
        weights: Tensor | None,
        held: _Data | None,
        *callbacks: Any,
    ) -> Fit:
        rows = len(x) if weights is None else int((weights > 0).sum())
        epochs = max(1, round(steps / -(-rows // self.options.batch_size)))
        kept: dict[str, Any] = {"scheduler": partial(CosineAnnealingLR, T_max=epochs)}
        kept.update(self.options.settings)
        given = kept.pop("callbacks", ())
        if held is not None and self.held_out:
            kept.update(validation=held.x, validation_weights=held.weights)
        else:
            kept.pop("patience", None)  # it counts epochs of the held-out bound
        return fit(
            pair,
            x,
            epochs=epochs,
            weights=weights,
            batch_size=self.options.batch_size,
            callbacks=(*given, *callbacks),
            **kept,
        )


def _one(c: int | None) -> int:
    assert c is not None
    return c


def _effective(weights: Tensor | None, count: int) -> float:
    return float(count) if weights is None else float(effective_sample_size(weights.log()))
