"""What boosting reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pyroboost.distributions import Components
from pyroboost.infer._mixture_table import Measured
from pyroboost.infer._mixture_weights import WeightStep

__all__ = ["BoostedRound", "Boosting"]


@dataclass(frozen=True)
class BoostedRound:
    """What one round, one step of fine-tuning or the joint pass has done.

    Args:
        stage: ``"round"``, ``"fine-tune"`` or ``"joint"``.
        passed: 0 in the first pass, then the number of the fine-tuning pass.
        component: the component that trained; ``None`` for all.
        attempt: how many fresh starts came before.
        accepted: whether the component, or what was tuned, is part of the mixture.
        verdict: the same in words.
        bound: the bound of the true mixture as it stands after the decision, in nats; always on
            draws from the same noise, so that bounds of two rounds differ by the gain.
        gain: what training and new weights have gained, and its error: for the first component
            over its start, ``None`` where that had no finite bound.
        own: what the component itself adds with the networks of now, and its error: the bound
            with the new weights less that without it.
        weights: the weights as they stand after the decision.
        proposed: the weights that were judged.
        steps: the search for the weights, step by step.
        floor: the least value of log G, in nats; ``None`` for none.
        floored: share of draws at the floor.
        pareto_k: k-hat of the mixture after the decision; of data, the median.
        history: the fit's history, a row an epoch.
        seconds: time it took.
    """

    stage: str
    passed: int
    component: int | None
    attempt: int
    accepted: bool
    verdict: str
    bound: Measured
    gain: Measured | None
    own: Measured | None
    weights: tuple[float, ...]
    proposed: tuple[float, ...]
    steps: tuple[WeightStep, ...] = field(repr=False)
    floor: float | None
    floored: float
    pareto_k: float | None
    history: list[dict[str, Any]] = field(repr=False)
    seconds: float

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.stage} {'all' if self.component is None else self.component}"


@dataclass(frozen=True)
class Boosting:
    """A boosted mixture and the reports of its rounds.

    Args:
        components: flows and weights, which are the guide's own.
        rounds: one report per round, fresh start and fine-tuning step.
        stopped: why boosting ended.
        held_out: whether bounds are those of held-out data.
        unit: what bounds belong to.
        seed: the seed from which everything follows.
        bound: the bound of the mixture as it stands, in nats, on draws that decided nothing; with
            rows, those rows did decide, so that it is a little too high for others.
    """

    components: Components
    rounds: tuple[BoostedRound, ...]
    stopped: str
    held_out: bool
    unit: str
    seed: int
    bound: Measured

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights as they stand."""
        return tuple(self.components.weights.tolist())

    @property
    def history(self) -> list[dict[str, Any]]:
        """All fits' histories in one list, with ``stage``, ``pass``, ``component``, ``step``."""
        rows: list[dict[str, Any]] = []
        for r in self.rounds:
            own = {
                "stage": r.stage,
                "pass": r.passed,
                "component": r.component,
                "attempt": r.attempt,
                "accepted": r.accepted,
            }
            rows += [{**own, "step": len(rows) + i, **row} for i, row in enumerate(r.history)]
        return rows

    def table(self) -> str:
        """Return the reports as a table for people; bounds in nats."""
        head = f"{'':<12} {'try':>3} {'bound':>20} {'gain':>18} {'floor':>6} {'k-hat':>6} "
        rows = [head + f"{'seconds':>8}  {'weights':<24} verdict"]
        for r in self.rounds:
            gain = "" if r.gain is None else str(r.gain)
            k = "" if r.pareto_k is None else f"{r.pareto_k:.2f}"
            weights = " ".join(f"{w:.3f}" for w in r.weights)
            rows.append(
                f"{r.name:<12} {r.attempt + 1:>3} {r.bound!s:>20} {gain:>18} {r.floored:>6.2f} "
                f"{k:>6} {r.seconds:>8.1f}  {weights:<24} {r.verdict}"
            )
        rows.append(f"bounds per {self.unit}; {self.stopped}; on fresh draws: {self.bound}")
        return "\n".join(rows)

    __str__ = table
