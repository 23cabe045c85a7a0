"""The law that ordinary objectives meet: a mixture that speaks up when one differentiates it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor

from pyroboost.distributions import BoostedFlow

__all__ = ["Guarded"]


class _Watched(torch.autograd.Function):
    """The identity, which calls a function when a gradient comes back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, act: Callable[[], None]) -> Tensor:
        ctx.act = act
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.act()
        return grad, None


class Guarded(BoostedFlow):
    """A mixture that says so where Pyro would take a score-function gradient without a word.

    `score_parts` is what every objective of Pyro asks a guide's site for. Its value is as usual,
    so that any bound can be measured; what comes back through its score term is watched. A
    mixture with one active component has none.
    """

    act: Callable[[int], None]

    @classmethod
    def of(cls, law: BoostedFlow, act: Callable[[int], None]) -> Guarded:
        """Return the same law, guarded.

        Args:
            law: the mixture.
            act: called with the number of active components; it may raise.
        """
        new: Guarded = cls.__new__(cls)
        new.__dict__.update(law.__dict__)
        new.act = act
        return new

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Return the log density, its score term, and its entropy term."""
        log_prob, score, entropy = super().score_parts(x, *args, **kwargs)
        if isinstance(score, Tensor) and score.requires_grad:
            score = _Watched.apply(score, lambda: self.act(len(self._active)))  # type: ignore[no-untyped-call]
        return ScoreParts(log_prob, score, entropy)
