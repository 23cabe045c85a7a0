"""Matching of a density that is known up to its log Z: the same flows, trained by their draws."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroboost.infer.boosting import Boosting, boost
from pyroboost.infer.callbacks import Callback, FitState
from pyroboost.infer.errors import NonFiniteLoss
from pyroboost.sampling import log_mean_exp
from pyroboost.sampling.psis import pareto_k

if TYPE_CHECKING:
    from pyroboost.models._flow_parts import FlowParts

__all__ = ["Matched", "match"]

_ROWS = 8192
_LOWEST = 0.01  # power of the density where annealing begins
LogDensity = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Matched:
    """What matching did, and what it says of the normaliser; all in nats.

    Args:
        boosting: the reports of the rounds.
        log_partition: the estimate of log Z of the density, by importance sampling.
        std_error: its standard error, as good as the draws that the mixture makes: mass that
            it misses altogether is not seen.
        ess: effective sample size of the weights.
        pareto_k: their Pareto shape.
        num_samples: draws of the mixture.
    """

    boosting: Boosting = field(repr=False)
    log_partition: float
    std_error: float
    ess: float
    pareto_k: float
    num_samples: int

    def table(self) -> str:
        """Return the rounds and the estimate as a table for people."""
        return (
            f"{self.boosting.table()}\n"
            f"log Z = {self.log_partition:.4f} ± {self.std_error:.4f} ({self.num_samples} draws, "
            f"ESS {self.ess:.0f}, k-hat {self.pareto_k:.2f})"
        )

    __str__ = table


class _Target(nn.Module):
    """The density to be matched, as a model without data, in standardised coordinates."""

    power = 1.0

    def __init__(self, log_density: LogDensity, parts: FlowParts) -> None:
        super().__init__()
        self._log_density = (log_density,)  # a module would be trained with the flows
        self.loc, self.scale = parts.loc, parts.scale
        self.eval()

    def forward(self) -> None:
        """Draw z from anywhere and score it; the power is that of training alone."""
        anywhere = dist.ImproperUniform(constraints.real_vector, (), self.loc.shape)
        z = pyro.sample("z", anywhere)
        value = checked(self._log_density[0], self.loc + self.scale * z)
        pyro.factor("log_density", (self.power if self.training else 1.0) * value)


class _Warm(Callback):
    """Raise the power of the density in the first fit, and count the fits.

    Args:
        target: the density.
        steps: over which its power rises.
    """

    def __init__(self, target: _Target, steps: int) -> None:
        self.target, self.steps, self.fits, self.done = target, steps, 0, 0

    def on_start(self, state: FitState) -> None:
        """Count a fit, and start low if it is the first."""
        self.fits += 1
        self._set()

    def on_batch(self, state: FitState) -> None:
        """Raise the power for the next step."""
        self.done += 1
        self._set()

    def _set(self) -> None:
        if self.fits > 1 or self.done >= self.steps:
            self.target.power = 1.0
        else:
            self.target.power = _LOWEST + (1 - _LOWEST) * self.done / self.steps


class _Draws(nn.Module):
    """The mixture as a guide."""

    def __init__(self, parts: FlowParts) -> None:
        super().__init__()
        self.components, self._base, self._zero = parts.flows, parts.base, parts.loc

    def forward(self) -> None:
        """Draw z from the mixture."""
        pyro.sample("z", self.components(self._base(torch.zeros_like(self._zero))))


def checked(log_density: LogDensity, z: Tensor) -> Tensor:
    """Return log densities of points, or say in one sentence what is wrong with them."""
    found = log_density(z)
    if not isinstance(found, Tensor) or found.shape != z.shape[:-1]:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"FlowMixture.match: log_density gave {shape} for points of shape {tuple(z.shape)}; "
            "let it return one number for each point, of their shape without the last dimension."
        )
    return found


def _check(annealing: int, num_samples: int, settings: dict[str, Any]) -> None:
    if annealing < 0 or num_samples < 2:
        raise ValueError(
            f"FlowMixture.match: annealing is {annealing} and num_samples {num_samples}; take 0 "
            "or more steps and 2 or more draws."
        )
    if annealing and (settings.get("checkpoints") is not None or settings.get("start")):
        raise ValueError(
            "FlowMixture.match: annealing is for the first component of a run from its start; "
            "leave out checkpoints and start, or annealing."
        )


def match(
    parts: FlowParts,
    log_density: LogDensity,
    num_samples: int,
    annealing: int,
    settings: dict[str, Any],
) -> Matched:
    """Boost the flows towards a density, then estimate its log Z by draws of the mixture."""
    _check(annealing, num_samples, settings)
    target, before = _Target(log_density, parts), copy.deepcopy(parts.state_dict())
    warm = _Warm(target, annealing)
    settings["callbacks"] = (*settings.get("callbacks", ()), warm)
    try:
        report = boost((target, _Draws(parts)), (), **settings)
    except BaseException as error:
        if warm.fits <= 1 or isinstance(error, NonFiniteLoss):  # no component was kept
            parts.load_state_dict(before)
        raise
    return _estimate(parts, log_density, num_samples, report)


@torch.no_grad()
def _estimate(
    parts: FlowParts, log_density: LogDensity, num_samples: int, report: Boosting
) -> Matched:
    """Estimate log Z by importance sampling with the mixture."""
    blocks, mixture = [], parts.mixture()
    for start in range(0, num_samples, _ROWS):
        z, log_q = mixture.sample_and_log_prob((min(_ROWS, num_samples - start),))
        value = checked(log_density, parts.loc + parts.scale * z)
        blocks.append((value + parts.log_det - log_q).double())
    log_weights = torch.cat(blocks)
    bad = int((log_weights.isnan() | (log_weights == math.inf)).sum())
    if bad:
        raise ValueError(
            f"FlowMixture.match: the density of {bad} of {num_samples} draws is infinite or not a "
            "number, so that log Z has no estimate; mend log_density there."
        )
    found = log_mean_exp(log_weights)
    return Matched(
        report,
        float(found.value),
        float(found.std_error),
        float(found.ess),
        float(pareto_k(log_weights)),
        num_samples,
    )
