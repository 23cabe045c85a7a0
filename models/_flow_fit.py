"""Boosting of flows on data: what each fit is worth, and what is kept."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroboost.compose._line_search import Slope, best_weight, mean_and_error, slope_at_zero
from pyroboost.infer.errors import is_numerical
from pyroboost.models._flow_report import FlowFit, FlowStep, Kind, Verdict
from pyroboost.models._flow_rounds import Trainer, Trial
from pyroboost.models._flow_weights import log_mixture, solve_weights

__all__ = ["Growth"]


@dataclass(frozen=True)
class _Verdict:
    """What was decided about a fit, and the weights that go with it."""

    words: Verdict
    helps: bool
    weights: Tensor
    slope: Slope | None = None
    gain: float = 0.0
    error: float = 0.0


@dataclass(frozen=True)
class _Kept:
    """The mixture as it stood before a fit, with the log densities of its components."""

    state: dict[str, Any]
    weights: Tensor
    tables: tuple[dict[int, Tensor], ...]


class Growth(Trainer):
    """Boosting of one mixture on data."""

    @torch.no_grad()
    def run(self) -> FlowFit:
        """Grow the mixture, settle its components, and keep its start if that was better."""
        mixture, judge = self.mixture, self.judge
        self.done: list[FlowStep] = []
        start = copy.deepcopy(mixture.state_dict())
        first = mean_and_error(mixture.log_marginal(judge.x).value.double(), judge.weights)[0]
        try:
            self._plan()
        except BaseException:  # Ctrl-C loses no more than the fit under way
            if not self.done or self._below(first):
                mixture.load_state_dict(start)
            raise
        kept = self._below(first)
        if kept:
            mixture.load_state_dict(start)
        return FlowFit(tuple(self.done), self.held_out, kept)

    def _below(self, value: float) -> bool:
        """Tell whether held-out data prefer a log-likelihood to the mixture's."""
        if not (self.held_out and math.isfinite(value)):
            return False
        return not self.judge.mean(self.mixture.weights) >= value

    def _plan(self) -> None:
        """Make all rounds, passes and the joint fit."""
        if self.options.start == "fresh":
            self.mixture.standardise_by(self.train.x, self.train.weights)
            self._try("round", 0)
        else:
            self._score(self.active)
        failures, count = 0, len(self.mixture.weights)
        for _ in range(2 * count):  # a component may be dropped again when later ones come
            idle = [c for c in range(count) if c not in self.active]
            if not idle or failures == self.options.attempts:
                break
            failures = 0 if self._try("round", idle[0]) else failures + 1
        for c in self.active * self.options.passes:
            if c in self.active and len(self.active) > 1:
                self._try("pass", c)
        if self.options.joint_steps:
            self._try("joint", None)

    # One fit

    def _try(self, kind: Kind, c: int | None) -> bool:
        """Make one fit, solve the weights, and keep both if they help."""
        kept, began = self._keep(), time.perf_counter()
        try:
            if kind == "round":
                trial = self.new_component(_one(c), kept.weights)
            else:
                trial = self.again(c)
            self._score(self.active if c is None else [c])
            verdict = self._decide(kind, c, kept)
        except BaseException as error:
            self._put_back(kept)
            if not (is_numerical(error) and kept.tables[0]):
                raise
            trial, verdict = Trial((), 0.0, 0.0), _Verdict("not finite", False, kept.weights)
        if verdict.helps:
            self.mixture.weights = verdict.weights
        else:
            self._put_back(kept)
        self._note(kind, c, trial, verdict, time.perf_counter() - began)
        return verdict.helps

    def _score(self, which: list[int]) -> None:
        for sample in self._samples():
            sample.score(self.mixture.components, which)

    def _samples(self) -> list[Any]:
        return [self.train, self.judge] if self.held_out else [self.train]

    def _keep(self) -> _Kept:
        state = copy.deepcopy(self.mixture.state_dict())
        tables = tuple(dict(sample.table) for sample in self._samples())
        return _Kept(state, self.mixture.weights.double(), tables)

    def _put_back(self, kept: _Kept) -> None:
        self.mixture.load_state_dict(kept.state)
        for sample, table in zip(self._samples(), kept.tables, strict=True):
            sample.table = dict(table)

    def _decide(self, kind: Kind, c: int | None, kept: _Kept) -> _Verdict:
        """Solve the weights on training data, and say whether held-out data want the fit.

        Weights solved for on the data that judge would flatter the mixture there.
        """
        judge, train, new = self.judge, self.train, kept.weights.clone()
        table: Mapping[int, Tensor] = kept.tables[-1]
        if not table:
            new.zero_()[_one(c)] = 1.0
            return _Verdict("base", True, new)
        before, slope = log_mixture(table, new), None
        if kind == "round":
            slope = slope_at_zero(before, judge.table[_one(c)], weights=judge.weights)
            log_q = log_mixture(kept.tables[0], new)
            w = best_weight(log_q, train.table[_one(c)], train.weights)
            new *= 1 - w
            new[_one(c)] += w
        new = solve_weights(train.table, new, train.weights)
        gain, error = mean_and_error(judge.mixed(new) - before, judge.weights)
        if slope is None:
            helps = gain > 0.0
            return _Verdict("better" if helps else "put back", helps, new, None, gain, error)
        helps = bool(new[_one(c)] > 0) and (slope.positive or gain > 2 * error > 0.0)
        return _Verdict("grows" if helps else "nothing gained", helps, new, slope, gain, error)

    def _note(
        self, kind: Kind, c: int | None, trial: Trial, verdict: _Verdict, seconds: float
    ) -> None:
        self.done.append(
            FlowStep(
                kind=kind,
                component=c,
                weights=tuple(self.mixture.weights.tolist()),
                beta=trial.beta,
                ess=trial.ess,
                slope=verdict.slope,
                after=self.judge.mean(self.mixture.weights),
                gain=verdict.gain,
                gain_error=verdict.error,
                verdict=verdict.words,
                steps=sum(row["batches"] for one in trial.fits for row in one.history),
                seconds=seconds,
                fits=trial.fits,
            )
        )


def _one(c: int | None) -> int:
    assert c is not None
    return c
