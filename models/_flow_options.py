"""What boosting of flows on data is asked for, and the data it is given: checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from pyroboost.infer.weighting import weighted_rows
from pyroboost.models._em_checks import check_data

if TYPE_CHECKING:
    from pyroboost.models._flow_parts import FlowParts

__all__ = ["Objective", "Options", "Rows", "weighed"]

Objective = Literal["mixture", "residual"]
Rows = tuple[Tensor, Tensor | None]
_SINGLE = {"epochs", "loss", "annealing", "checkpoint", "checkpoint_every", "resume"}


@dataclass(frozen=True)
class Options:
    """Settings of :meth:`FlowMixture.fit`, which explains them."""

    start: str
    steps: int
    objective: Objective
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
        for name, known in {
            "start": ("fresh", "current"),
            "objective": ("mixture", "residual"),
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"FlowMixture.fit: {name} is {getattr(self, name)!r}; "
                    f"pass {known[0]!r} or {known[1]!r}."
                )
        if not 0.0 <= self.ess < 1.0:
            raise ValueError(
                f"FlowMixture.fit: ess is {self.ess}; take a fraction of at least 0 and below 1."
            )
        refused = sorted(set(self.settings) & _SINGLE)
        if refused:
            raise ValueError(
                f"FlowMixture.fit: {refused[0]} has no meaning for a sequence of fits; lengths "
                "are steps, pass_steps and joint_steps."
            )


def weighed(parts: FlowParts, name: str, x: Tensor, weights: Tensor | None) -> Rows:
    """Check data, put them where the mixture is, and leave out those of weight 0.

    Args:
        parts: the flows.
        name: what a sentence calls the data.
        x: data.  # (N, D)
        weights: of the data.  # (N,)
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"FlowMixture.fit: {name} is {type(x).__name__}; boosting weighs all data at once, "
            "so pass one tensor (N, D)."
        )
    check_data(x, 1, f"FlowMixture.fit ({name})")
    parts.check(x)
    x = x.detach().to(parts.loc)
    if weights is None:
        return x, None
    (kept,), found = weighted_rows((x,), weights, f"{name} weights")
    if len(kept) < 2:
        raise ValueError(
            f"FlowMixture.fit ({name}): one datum alone has a weight above 0; pass at least two."
        )
    return kept, found.to(kept)
