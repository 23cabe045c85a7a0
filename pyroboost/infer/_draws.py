"""What stands around the runs of a guide: its draws as leaves, its rows the same in every run."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroboost.handlers import is_plate

__all__ = ["Gradient", "Leaf", "cut", "same_rows"]

Gradient = Literal["standard", "sticking-the-landing", "doubly-reparameterised"]
_, _STICKING, _DOUBLY = get_args(Gradient)


class Leaf(NamedTuple):
    """One draw of the guide, twice.

    Attributes:
        drawn: z as a function of the guide's parameters and of earlier leaves.
        leaf: the same numbers, on which all else depends.
        event_dim: dimensions of one value.
    """

    drawn: Tensor
    leaf: Tensor
    event_dim: int


class cut(Messenger):
    """Go on from each draw of the guide as if it were a constant, and remember the draw.

    Every density is then a function of the values, of the model's parameters and of the guide's,
    and the three gradients can be told apart, also where model and guide share parameters.
    """

    def __init__(self, gradient: str, num_particles: int) -> None:
        super().__init__()
        self.gradient, self.num_particles = gradient, num_particles
        self.leaves: list[Leaf] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_plate(msg) or msg["is_observed"]:
            return
        if not msg["fn"].has_rsample:
            raise ValueError(
                f"ImportanceWeightedELBO: gradient='{self.gradient}' moves along reparameterised "
                f"draws, and '{msg['name']}' of the guide is not one; use gradient='standard'."
            )
        law = msg["fn"]
        while hasattr(law, "base_dist"):
            law = law.base_dist
        if isinstance(law, Delta) and self.gradient == _DOUBLY and self.num_particles > 1:
            raise ValueError(
                f"ImportanceWeightedELBO: '{msg['name']}' is a point mass, which has no density to "
                f"reparameterise a second time; use gradient='{_STICKING}'."
            )
        if msg["value"].requires_grad:
            leaf = msg["value"].detach().requires_grad_()
            self.leaves.append(Leaf(msg["value"], leaf, msg["fn"].event_dim))
            msg["value"] = leaf


class same_rows(Messenger):
    """Let every run take the rows that the first one drew from its plates."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate(msg) and msg["value"] is None and msg["name"] in self.rows:
            msg["value"], msg["done"] = self.rows[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_plate(msg):
            self.rows[msg["name"]] = msg["value"]
