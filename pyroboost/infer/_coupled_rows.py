"""Whether a model couples the rows of a boosted site, which strata of all rows at once forbid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroboost.contexts import service
from pyroboost.handlers import is_plate
from pyroboost.infer._mixture_draws import Programs, run
from pyroboost.infer.rng import isolated_rng
from pyroboost.metamodel import MetaModel

__all__ = ["Drawn", "check_rows", "is_random"]


def is_random(site: Any) -> bool:
    """Tell whether a guide draws at a site: not a plate, a factor or a point."""
    return not (is_plate(site) or site["is_observed"] or isinstance(site["fn"], Delta))


class Drawn(Messenger):
    """Remember what a guide draws at each of its random sites, run after run."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[Tensor]] = {}
        self.event_dims: dict[str, int] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_random(msg):
            self.values.setdefault(msg["name"], []).append(msg["value"])
            self.event_dims[msg["name"]] = msg["fn"].event_dim


class _Held(Messenger):
    """Put given values at some sites instead of draws."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if is_random(msg) and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


def check_rows(pair: MetaModel, args: Sequence[Any], device: torch.device, seed: int) -> None:
    r"""Refuse a model in which rows of the boosted site act on each other.

    Each row of a mixture in a plate draws its own component, and strata, in which all rows have
    the same one, give the right mean only of sums over rows. Two values a, b of the site and the
    same with half of their rows exchanged have

    $$f(a) + f(b) = f(a') + f(b')$$

    for f a sum over rows, and else do not, f being the joint less the guide's other sites.

    Args:
        pair: the meta-model.
        args: its arguments.
        device: whose random state comes back.
        seed: of the values.

    Raises:
        ValueError: the rows are coupled.
    """
    with service(pair), pyro.validation_enabled(False):
        try:
            gap, scale = _gap(pair, tuple(args), device, seed)
        except Exception:  # a model that breaks is for a step to name
            return
    if gap > 1e-3 + 64 * torch.finfo(torch.float32).eps * scale:
        raise ValueError(
            "boost: the model couples the rows of the boosted site (by "
            f"{gap:.3g} nats), each of which has a component of its own, so that components "
            "cannot be drawn for all rows at once; sample the rows as one vector, from flows of "
            "its dimension."
        )


@torch.no_grad()
def _gap(
    pair: MetaModel, args: tuple[Any, ...], device: torch.device, seed: int
) -> tuple[float, float]:
    """Return how far the two sums are apart, and how large they are."""

    def joint(program: Any, value: Tensor | None = None, stream: int = 0) -> tuple[Tensor, Tensor]:
        one = Programs(pair.model, program, pair, 0, False)
        with isolated_rng(device, seed + stream):  # plates take the same rows in every run
            found = run(one, args, 0, [0], None, value)
        return found[0].double(), found[3]

    drawn = Drawn()
    a = joint(drawn(pair.guide))[1]
    b = joint(pair.guide, stream=1)[1]
    rows = a.shape[:-1].numel()
    if rows < 2:
        return 0.0, 0.0
    others = {name: v[0] for name, v in drawn.values.items() if v[0] is not a}
    held = _Held(others)(pair.guide)
    even = (torch.arange(rows, device=a.device) % 2 == 0).reshape(*a.shape[:-1], 1)
    values = [a, b, torch.where(even, a, b), torch.where(even, b, a)]
    terms = [joint(held, value)[0] for value in values]
    sums = [float(one.sum()) for one in terms]
    scale = sum(float(one.abs().sum()) for one in terms)
    return abs(sums[0] + sums[1] - sums[2] - sums[3]), scale
