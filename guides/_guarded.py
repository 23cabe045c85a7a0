"""The law that ordinary objectives meet: a mixture of several components refuses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyroboost.distributions import BoostedFlow

__all__ = ["Guarded"]


class Guarded(BoostedFlow):
    """A mixture that says so where Pyro would take a score-function gradient without a word.

    `score_parts` is what every objective of Pyro asks a guide's site for. With one active
    component, without gradients and for flows that are not trained it is as usual.
    """

    @classmethod
    def of(cls, law: BoostedFlow) -> Guarded:
        """Return the same law, guarded."""
        new: Guarded = cls.__new__(cls)
        new.__dict__.update(law.__dict__)
        return new

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the log density and its score term, or raise.

        Raises:
            NotImplementedError: gradients are on and several components are trained.
        """
        trained = torch.is_grad_enabled() and any(
            p.requires_grad for c in self._active for p in self.components[c].parameters()
        )
        if trained and not self.has_rsample:
            raise NotImplementedError(
                f"AutoBoostedFlow: {len(self._active)} components have weight, and an ordinary "
                "objective has no pathwise gradient through the choice among them; train them by "
                "pyroboost.infer.boost((model, guide), data)."
            )
        return super().score_parts(x, *args, **kwargs)
