"""The rounds of gradient boosting: train, weigh, judge, keep or put back."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from pyroboost.infer import checkpoint as files
from pyroboost.infer._boosting_bench import Bench
from pyroboost.infer._boosting_fit import train
from pyroboost.infer._boosting_judge import (
    Decision,
    base,
    choose_weights,
    failure,
    judge,
    report_fields,
)
from pyroboost.infer._boosting_pair import only, proposer
from pyroboost.infer._boosting_report import BoostedRound, Boosting
from pyroboost.infer._boosting_state import forget, read_state, write_state
from pyroboost.infer._mixture_draws import Mixed
from pyroboost.infer._mixture_table import Table
from pyroboost.infer._round_law import Stage
from pyroboost.infer.errors import NonFiniteLoss, is_numerical
from pyroboost.infer.rng import isolated_rng

__all__ = ["Booster"]


class Booster(Bench):
    """A boosting under way; see :func:`pyroboost.infer.boost`."""

    # The plan

    def run(self) -> Boosting:
        """Grow, fine-tune and train jointly, or go on with what a checkpoint holds."""
        start = self._snapshot()
        try:
            return self._run()
        except Mixed:
            warnings.warn(
                "boost: draws taken at once have other log densities than each by itself, as where "
                "a model branches on its values; boosting starts again with one draw at a time, "
                "which is slower.",
                stacklevel=3,
            )
            files.restore(self.pair, start[0])
            self.components.weights.copy_(start[1])
            self.programs = replace(self.programs, vectorized=False, mapped=False)
            self.rounds = []
            forget(self)
            return self._run()

    def _run(self) -> Boosting:
        options = self.options
        weights = self.components.weights
        if options.start == 0:
            weights.copy_(torch.eye(len(weights))[0])
        elif not bool((weights[: options.start] > 0).any()):
            raise ValueError(f"boost: start={options.start}, and no component before has a weight.")
        read_state(self)
        stopped = self._grow()
        for passed in range(1, options.finetune + 1):
            for c in range(len(self.components)):
                self._finetune(passed, c)
        if options.joint and len(self.components.active) > 1:
            self._joint()
        active = self.components.active
        return Boosting(
            bound=self._table(active, "final").bound(self.components.weights[active].detach()),
            components=self.components,
            rounds=tuple(self.rounds),
            stopped=stopped,
            held_out=self.held_out,
            unit="data set" if options.whole else "datum",
            seed=self.seed,
        )

    def _grow(self) -> str:
        options = self.options
        while True:
            own = [r for r in self.rounds if r.stage == "round"]
            c = options.start + sum(r.accepted for r in own)
            failed = 0
            while failed < len(own) and not own[-1 - failed].accepted:
                failed += 1
            if c == len(self.components):
                return "no component is left to try"
            if failed >= options.failures:
                return f"{failed} fresh starts in a row gained nothing"
            self._round(c, failed)

    # One training and its judgement

    def _round(self, c: int, attempt: int) -> None:
        kept = self._snapshot()
        with isolated_rng(self.device, self.stream("fresh", c, attempt)):
            self._fresh(c, attempt)
        weights = kept[1]
        first = not any(r.accepted for r in self.rounds) and not self.options.start
        if first:  # what a fresh start has to be better than is itself
            kept = self._snapshot()
        kind = "plain" if first else self.options.objective
        if kind == "mixture":
            share = 1.0 / (1 + int((weights > 0).sum()))
            weights = (1 - share) * weights
            weights[c] = share
        self._train("round", 0, c, attempt, kind, weights, self.options.length, kept)

    def _fresh(self, c: int, attempt: int) -> None:
        """Put component c at a start: the guide's own, or a new flow."""
        propose = proposer(self.inner.guide)
        if c == 0 and not attempt:
            return  # as it was built
        if propose is None:
            self.components.restart(c)
            return
        args, kwargs = (self.rows[0], {})
        if self.options.whole:
            args, kwargs = self.own_args, self.own_kwargs
        if "attempt" in signature(propose).parameters:
            kwargs = {**kwargs, "attempt": attempt}
        propose(c, *args, **kwargs)

    def _finetune(self, passed: int, c: int) -> None:
        if any((r.stage, r.passed, r.component) == ("fine-tune", passed, c) for r in self.rounds):
            return
        kept = self._snapshot()
        weights = kept[1]
        if not weights[c] > 0 or int((weights > 0).sum()) < 2:
            return
        kind = self.options.finetune_objective
        if kind != "mixture":
            weights = weights.clone()
            weights[c] = 0.0
            weights = weights / weights.sum()
        self._train("fine-tune", passed, c, 0, kind, weights, self.options.fine_length, kept)

    def _joint(self) -> None:
        if any(r.stage == "joint" for r in self.rounds):
            return
        kept = self._snapshot()
        self._train("joint", 0, None, 0, "joint", kept[1], self.options.joint, kept)

    def _snapshot(self) -> tuple[dict[str, Any], Tensor]:
        return files.snapshot(self.pair), self.components.weights.detach().clone()

    def _train(
        self,
        name: str,
        passed: int,
        c: int | None,
        attempt: int,
        kind: str,
        weights: Tensor,
        length: int,
        kept: tuple[dict[str, Any], Tensor],
    ) -> None:
        began = time.perf_counter()
        address, old = (name, passed, c, attempt), kept[1]
        stage = Stage(0 if c is None else c, kind, entropy=self.options.entropy)
        stage.counts = stage.counts.to(self.device)
        history: list[dict[str, Any]] = []
        try:
            decision = self._attempt(address, stage, weights, length, old, history)
        except BaseException:
            files.restore(self.pair, kept[0])
            raise
        if decision.keep:
            self.components.weights.copy_(torch.tensor(decision.weights))
        else:
            files.restore(self.pair, kept[0])
        floored, seen = stage.counts.tolist()
        self.rounds.append(
            BoostedRound(
                stage=name,
                passed=passed,
                component=c,
                attempt=attempt,
                floor=None if stage.floor == -math.inf else stage.floor,
                floored=floored / seen if seen else 0.0,
                history=history,
                seconds=time.perf_counter() - began,
                **report_fields(decision),
            )
        )
        write_state(self)

    def _attempt(
        self,
        address: Sequence[Any],
        stage: Stage,
        weights: Tensor,
        length: int,
        old: Tensor,
        history: list[dict[str, Any]],
    ) -> Decision:
        """Train and judge; what is not finite is a failure, but of the first component."""
        (_, _, c, attempt), kind = address, stage.objective
        active = [j for j in range(len(old)) if old[j] > 0]
        first = kind == "plain"
        before = self._start(active) if first else self._table(active, "judge")
        if kind in ("residual", "kl", "sampled"):
            stage.floor = self._floor(weights)
        try:
            with only(self.components, active if c is None else [c], weights):
                with self.components.learning_weights() if c is None else nullcontext():
                    history += train(self, address, stage, length).history
                trained = self.components.weights.clone()
            if first:
                return base(before, self._table(active, "judge"), old)
            assert before is not None
            return self._judge(address, before, old, trained if c is None else None)
        except Exception as error:
            if not is_numerical(error) or (first and attempt + 1 >= self.options.failures):
                raise
            site = getattr(error, "site", None)
            why = f"{site or 'a density'} is not finite"
            if not isinstance(error, NonFiniteLoss):
                why = "a program refused a draw"
            return failure(before, old, f"failed: {why}")

    def _start(self, active: list[int]) -> Table | None:
        """Return draws of what stands before the first round, if they are of any use."""
        try:
            return self._table(active, "judge")
        except Exception as error:
            if not is_numerical(error):
                raise
            return None

    def _judge(
        self, address: Sequence[Any], before: Table, old: Tensor, trained: Tensor | None
    ) -> Decision:
        """Choose weights on some draws and judge them on others."""
        c = address[2]
        active = sorted({*before.components, *([] if c is None else [c])})

        def draws(which: Sequence[int], *purpose: Any, draws: int | None = None) -> Table:
            return self._table(which, *purpose, *address, draws=draws)

        if trained is None:
            found = choose_weights(self.options, draws, active, old, c)
        else:
            found = (trained[active], [])
        after = self._table(active, "judge")
        return judge(address[0], c, before, old, after, found, self.options)
