"""The fits of a mixture of flows on data: a new component, one against all others, or all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyroboost.compose._line_search import best_weight, mean_and_error, tempered
from pyroboost.infer._boosting_pair import only
from pyroboost.infer.errors import NonFiniteLoss
from pyroboost.infer.fit import Fit, fit
from pyroboost.infer.weighting import redrawn
from pyroboost.models._flow_options import Options, Rows
from pyroboost.models._flow_weights import log_mixture, nearest, solve_weights
from pyroboost.sampling import effective_sample_size

if TYPE_CHECKING:
    from pyroboost.models._flow_parts import FlowParts
    from pyroboost.models.flow_mixture import FlowMixture

__all__ = ["Sample", "Trainer", "Trial"]

_ROWS = 4096  # of data: scored at once, or to solve weights between the epochs of a fit


@dataclass(frozen=True)
class Trial:
    """What was fitted, and how the data were weighed for it."""

    fits: tuple[Fit, ...]
    beta: float
    ess: float


class Sample:
    """Data with their weights, and the log densities of the components there.

    Args:
        x: data.  # (N, D)
        weights: of the data; ``None``: all alike.  # (N,)
    """

    def __init__(self, x: Tensor, weights: Tensor | None) -> None:
        self.x, self.weights = x, weights
        self.table: dict[int, Tensor] = {}

    def score(self, parts: FlowParts, which: Sequence[int]) -> None:
        """Take the log densities of some components anew."""
        with pyro.validation_enabled(False):  # what is not a number is told in one sentence
            blocks = [parts.scores(rows, which) for rows in torch.split(self.x, _ROWS)]
        found = torch.cat(blocks).detach().double()
        wrong = found.isnan()
        if bool(wrong.any()):
            bad = [c for c, one in zip(which, wrong.any(0).tolist(), strict=True) if one]
            raise NonFiniteLoss(
                f"FlowMixture.fit: the density of components {bad} is not a number at "
                f"{int(wrong.any(-1).sum())} of {len(found)} data; lower lr, or take a flow whose "
                "inverse is better conditioned.",
                epoch=0,
                batch=0,
                site=None,
            )
        self.table.update(zip(which, found.unbind(-1), strict=True))

    def mixed(self, weights: Tensor) -> Tensor:
        """Return the log density of the mixture at all data, (N,)."""
        return log_mixture(self.table, weights)

    def mean(self, weights: Tensor) -> float:
        """Return the log-likelihood of the mixture in nats per datum."""
        return mean_and_error(self.mixed(weights), self.weights)[0]

    @property
    def effective(self) -> float:
        """The effective number of data."""
        if self.weights is None:
            return float(len(self.x))
        return float(effective_sample_size(self.weights.log()))


class Trainer:
    """One fit after another of a mixture's components.

    Args:
        mixture: the mixture, trained in place.
        train: training data and their weights.
        held_out: held-out data and their weights; ``None``: training data decide.
        options: settings.
    """

    def __init__(
        self, mixture: FlowMixture, train: Rows, held_out: Rows | None, options: Options
    ) -> None:
        self.mixture, self.options = mixture, options
        self.train = Sample(*train)
        self.judge = self.train if held_out is None else Sample(*held_out)
        self.held_out = held_out is not None

    @property
    def active(self) -> list[int]:
        """The components of positive weight."""
        return self.mixture.components.flows.active

    def new_component(self, c: int, old: Tensor) -> Trial:
        """Fit a new component to what the others miss, or the first to the data as they are."""
        steps = self.options.steps
        self.mixture.components.flows.restart(c)
        if not self.train.table:
            found = self._alone(c, steps, self.train.weights, self.judge)
            return Trial((found,), 0.0, self.train.effective)
        log_q = self.train.mixed(old)
        if not bool(log_q.isfinite().all()):
            raise ValueError(
                f"FlowMixture.fit: the density of {int((~log_q.isfinite()).sum())} training data "
                "is 0 or not a number, so that 1/q is no weight; take a base with heavier tails, "
                "or leave these data out."
            )
        drawn = tempered(log_q, self.options.ess, weights=self.train.weights)
        if self.options.objective == "mixture":
            return Trial(self._in_two_halves(c, old, drawn.weights), drawn.beta, drawn.ess)
        judge = self.judge
        held = tempered(judge.mixed(old), 0.0, beta=drawn.beta, weights=judge.weights).weights
        found = self._alone(c, steps, drawn.weights, Sample(judge.x, held))
        return Trial((found,), drawn.beta, drawn.ess)

    def _in_two_halves(self, c: int, old: Tensor, weights: Tensor) -> tuple[Fit, Fit]:
        """Fit a component to data around one that is missed, then within the mixture."""
        train, steps = self.train, self.options.steps
        share = 0.5 / (len(self.active) + 1)
        near = nearest(self.mixture.components.standardise(train.x), weights, share)
        first = self._alone(c, max(1, steps // 2), weights * near, None)
        train.score(self.mixture.components, [c])
        w = max(best_weight(train.mixed(old), train.table[c], train.weights), share)
        new = (1 - w) * old
        new[c] += w
        self.mixture.weights = new
        return first, self._within([c], max(1, steps - steps // 2))

    def again(self, c: int | None) -> Trial:
        """Fit one component against all others, or all of them at once."""
        which, steps = self.active, self.options.joint_steps
        if c is not None:
            which, steps = [c], self.options.pass_steps
        return Trial((self._within(which, steps),), 0.0, self.train.effective)

    def _within(self, which: list[int], steps: int) -> Fit:
        """Fit some components by the likelihood of the whole mixture; the others do not move."""
        mixture, train = self.mixture, self.train
        every = max(1, len(train.x) // _ROWS)
        few = Sample(train.x[::every], None if train.weights is None else train.weights[::every])
        weigh = partial(self._reweigh, few)
        with only(mixture.components.flows, which, mixture.weights):
            found = self._fit(mixture, steps, train.x, train.weights, self.judge, weigh)
            weights = mixture.weights
        mixture.weights = weights
        return found

    def _reweigh(self, few: Sample, _state: Any) -> None:
        """Solve the weights between two epochs."""
        with torch.no_grad():
            few.score(self.mixture.components, self.active)
        old = self.mixture.weights.double()
        new = solve_weights(few.table, old, few.weights, max_iterations=20, least=0.0)
        # A component in training is given a chance until its fit is judged.
        self.mixture.weights = torch.where(old > 0, new.clamp_min(1e-3), 0.0)

    def _alone(self, c: int, steps: int, weights: Tensor | None, held: Sample | None) -> Fit:
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
        held: Sample | None,
        *callbacks: Any,
    ) -> Fit:
        rows = len(x) if weights is None else int((weights > 0).sum())
        epochs = max(1, round(steps / -(-rows // self.options.batch_size)))
        kept: dict[str, Any] = {"scheduler": partial(CosineAnnealingLR, T_max=epochs)}
        kept.update(self.options.settings)
        kept["callbacks"] = (*kept.get("callbacks", ()), *callbacks)
        if held is not None and self.held_out:
            kept.update(validation=held.x, validation_weights=held.weights)
        else:
            kept.pop("patience", None)  # it counts epochs of the held-out bound
        size = self.options.batch_size
        with torch.enable_grad():
            return fit(pair, x, epochs=epochs, weights=weights, batch_size=size, **kept)
