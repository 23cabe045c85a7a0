"""What boosting of flows on data did, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pyroboost.compose._line_search import Slope
from pyroboost.infer.fit import Fit

__all__ = ["FlowFit", "FlowStep", "Kind", "Verdict"]

Kind = Literal["round", "pass", "joint"]
Verdict = Literal["base", "grows", "nothing gained", "better", "put back", "not finite"]


@dataclass(frozen=True)
class FlowStep:
    r"""What one fit did to the mixture; log-likelihoods are means per datum, in nats.

    Args:
        kind: ``"round"``: a new component; ``"pass"``: one component against all others;
            ``"joint"``: all of them.
        component: which; ``None`` for all.
        weights: of all components afterwards.
        beta: power of $1 / q$ in the weights of the data of a round; 0 elsewhere.
        ess: effective number of data that the weights of the data left.
        slope: the test of a new component; ``None`` for the first and for passes.
        after: log-likelihood of the mixture after what was decided.
        gain: what the fit gained, whether that was kept or not.
        gain_error: its standard error, from the differences of the data.
        verdict: what was decided; ``"not finite"``: the loss was not, and the fit was put back.
        steps: gradient steps.
        seconds: wall-clock time.
        fits: the fits, one after another.
    """

    kind: Kind
    component: int | None
    weights: tuple[float, ...]
    beta: float
    ess: float
    slope: Slope | None
    after: float
    gain: float
    gain_error: float
    verdict: Verdict
    steps: int
    seconds: float
    fits: tuple[Fit, ...] = field(repr=False)


@dataclass(frozen=True)
class FlowFit:
    """What boosting on data did.

    Args:
        steps: the fits, in their order.
        held_out: whether log-likelihoods are those of held-out data.
        kept_start: whether the mixture was left as it stood, because held-out data preferred it.
    """

    steps: tuple[FlowStep, ...]
    held_out: bool
    kept_start: bool = False

    @property
    def history(self) -> list[float]:
        """Log-likelihood after each step, in nats per datum; it never falls."""
        return [step.after for step in self.steps]

    @property
    def num_steps(self) -> int:
        """Gradient steps of all fits together."""
        return sum(step.steps for step in self.steps)

    def table(self) -> str:
        """Return the steps as a table for people."""
        head = f"{'step':<10} {'beta':>6} {'ESS':>8} {'log-likelihood':>15} {'gain':>16} "
        rows = [f"{head}{'steps':>6} {'seconds':>8}  verdict; weights"]
        for s in self.steps:
            name = s.kind if s.component is None else f"{s.kind} {s.component}"
            gain = (
                "" if s.verdict in ("base", "not finite") else f"{s.gain:.3f} ± {s.gain_error:.3f}"
            )
            weights = " ".join(f"{w:.3f}" for w in s.weights)
            rows.append(
                f"{name:<10} {s.beta:>6.3f} {s.ess:>8.0f} {s.after:>15.3f} {gain:>16} "
                f"{s.steps:>6} {s.seconds:>8.1f}  {s.verdict}; {weights}"
            )
        data = "held-out" if self.held_out else "training"
        rows.append(f"exact log-likelihoods of {data} data, which also decided: a little too high")
        if self.kept_start:
            rows.append("the start was kept: held-out data prefer it")
        return "\n".join(rows)

    __str__ = table
