"""What a guide samples from while one component trains, put there by a handler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyroboost.distributions import BoostedFlow
from pyroboost.handlers import is_plate

__all__ = ["OBJECTIVES", "RoundLaw", "Stage", "at_site", "pathwise", "scale_kl"]

OBJECTIVES = ("residual", "kl", "sampled", "mixture")
"""What a new component can be trained by."""


@dataclass
class Stage:
    r"""What one component is trained for; the weights of the guide's mixture say what is fixed.

    Args:
        component: the component that trains, c.
        objective: one of :data:`OBJECTIVES`, or ``"plain"`` for a first round.
        entropy: lambda, the factor of $\log g$ (of the whole KL for ``"kl"``).
        floor: the least value of $\log G$ in nats; minus infinity for none.
        rate: how often an example is drawn from the fixed mixture instead.
    """

    component: int
    objective: str = "plain"
    entropy: float = 1.0
    floor: float = -math.inf
    rate: float = 0.0
    counts: Tensor = field(
        default_factory=lambda: torch.zeros(2, dtype=torch.long), init=False
    )  # floored, all
    coin: bool = field(default=False, init=False)  # whether a whole run of "kl" is blended

    @property
    def whole(self) -> bool:
        """Whether all examples of a run are blended or none, since the model is scaled too."""
        return self.objective == "kl" and self.entropy != 1.0

    def toss(self) -> None:
        """Draw the coin of a run."""
        fresh = self.whole and self.rate > 0 and torch.is_grad_enabled()
        self.coin = fresh and bool(torch.rand(()) < self.rate)


def pathwise(density: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    r"""Return a log density whose gradient reaches the points and nothing else.

    Parameters of every kind (of flows, of a conditional base, of its encoder) are held fixed, so
    that $\partial \log q(z(\phi)) / \partial\phi$ is $\nabla_z \log q \cdot \partial z /
    \partial\phi$.

    Args:
        density: the log density of points.  # (*B, D) -> (*B)
        value: the points.  # (*B, D)

    Example:
        >>> scale, z = torch.tensor(2.0, requires_grad=True), torch.ones(3, 1, requires_grad=True)
        >>> pathwise(lambda v: (scale * v).sum(-1), z).sum().backward()
        >>> z.grad.flatten().tolist(), scale.grad
        ([2.0, 2.0, 2.0], None)
    """
    if not (torch.is_grad_enabled() and value.requires_grad):
        return density(value).detach()
    point = value.detach().requires_grad_()
    result = density(point)
    (slope,) = torch.autograd.grad(result.sum(), point)
    # The added term is zero and carries the gradient.
    return result.detach() + (slope * (value - value.detach())).sum(-1)


class RoundLaw(TorchDistribution):
    r"""Draws of component c, scored by the objective of its round instead of its density.

    ``log_prob`` is what stands for $\log q$ in the bound: $\lambda \log g_c(z) + \max(\log G(z),
    \mathrm{floor})$ for ``"residual"``. A blended example comes from the fixed mixture G and is
    scored by $\log G$.

    Args:
        mixture: the fixed mixture G, whose component c has no weight; for ``"mixture"`` the whole.
        stage: what is trained, and how.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - the name and form of torch
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mixture: BoostedFlow, stage: Stage) -> None:
        self.mixture, self.stage = mixture, stage
        self._drawn: tuple[Tensor, Tensor, Tensor | None] | None = None
        super().__init__(mixture.batch_shape, mixture.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RoundLaw:
        """Repeat the law over more batch dimensions."""
        return RoundLaw(self.mixture.expand(batch_shape), self.stage)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw from component c, and blended examples from the fixed mixture."""
        stage, q = self.stage, self.mixture
        blended = self._coins(torch.Size(sample_shape))
        if blended is None:
            value, log_g = q.rsample_component_and_log_prob(stage.component, sample_shape)
        else:
            value, log_g = self._blend(torch.Size(sample_shape), blended)
        self._drawn = (value, log_g, blended)
        return value

    def _coins(self, sample_shape: torch.Size) -> Tensor | None:
        if not (self.stage.rate and torch.is_grad_enabled()):
            return None
        shape = sample_shape + self.batch_shape
        if self.stage.whole:
            return torch.full(shape, self.stage.coin, device=self.mixture.weights.device)
        return torch.rand(shape, device=self.mixture.weights.device) < self.stage.rate

    def _blend(self, sample_shape: torch.Size, blended: Tensor) -> tuple[Tensor, Tensor]:
        """Push each base draw through the flow that its coin chose."""
        q = self.mixture
        z0 = q.base.rsample(sample_shape)
        drawn = q._choose(blended.shape)
        drawn = torch.where(blended, drawn, self.stage.component)
        value, log_g = z0, z0.new_zeros(blended.shape)
        base = q.base.log_prob(z0)
        for c in torch.unique(drawn).tolist():
            rows = drawn == c
            moved, log_det = q.components[c](z0[rows], q._rows(rows))
            value = value.masked_scatter(rows.unsqueeze(-1), moved)
            log_g = log_g.masked_scatter(rows, base[rows] - log_det)
        return value, log_g

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the objective's stand-in for log q in nats, (*S, *B)."""
        stage, q = self.stage, self.mixture
        if self._drawn is not None and self._drawn[0] is value:
            _, log_g, blended = self._drawn
        else:
            log_g, blended = q._score(stage.component, value), None
        if stage.objective == "plain":
            return log_g
        if stage.objective == "mixture":
            return pathwise(q.log_prob, value)
        fixed = self._sampled(value) if stage.objective == "sampled" else None
        if fixed is None:
            fixed = pathwise(q.log_prob, value)
        result = stage.entropy * log_g + self._floored(fixed, blended)
        if blended is None:
            return result
        ordinary = pathwise(q.log_prob, value) if stage.objective == "sampled" else fixed
        return torch.where(blended, ordinary, result)

    def _floored(self, fixed: Tensor, blended: Tensor | None) -> Tensor:
        if self.stage.floor == -math.inf:
            return fixed
        if torch.is_grad_enabled():
            below = fixed.detach() < self.stage.floor
            own = torch.ones_like(below) if blended is None else ~blended
            self.stage.counts += torch.stack([(below & own).sum(), own.sum()])
        return fixed.clamp(min=self.stage.floor)

    def _sampled(self, value: Tensor) -> Tensor:
        """Return the log density of one fixed component, drawn for each example."""
        q = self.mixture
        value = value.expand(*value.shape[: -1 - len(self.batch_shape)], *self.batch_shape, -1)
        drawn = q._choose(value.shape[:-1])
        z0, log_det = value, value.new_zeros(drawn.shape)
        for c in torch.unique(drawn).tolist():
            rows = drawn == c
            source, terms = q.components[c].inverse(value[rows], q._rows(rows))
            z0 = z0.masked_scatter(rows.unsqueeze(-1), source)
            log_det = log_det.masked_scatter(rows, terms)
        return q.base.log_prob(z0) + log_det


class at_site(Messenger):
    """Replace the law of the one site of a guide that samples a boosted flow.

    Args:
        law: what to put there, from the mixture that the guide samples from.
        value: a value to put there too, instead of a draw.
    """

    def __init__(
        self, law: Callable[[BoostedFlow], TorchDistribution], value: Tensor | None = None
    ) -> None:
        super().__init__()
        self.law, self.value = law, value
        self.name: str | None = None

    def __enter__(self) -> Any:
        self.name = None
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        done = super().__exit__(kind, error, trace)
        if kind is None and self.name is None:
            raise ValueError(
                "boost: the guide samples no site from a BoostedFlow; sample one from "
                "self.components(base), and not from a transform or an Independent of it."
            )
        return done

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate(msg) or not isinstance(msg["fn"], BoostedFlow):
            return
        if self.name is not None:
            raise ValueError(
                f"boost: the guide samples both '{self.name}' and '{msg['name']}' from boosted "
                "flows; boost one site at a time."
            )
        self.name = msg["name"]
        msg["fn"] = self.law(msg["fn"])
        if self.value is not None:
            msg["value"] = self.value


class scale_kl(Messenger):
    """Scale what a KL divergence is made of by lambda, unless this run is a blended one.

    Args:
        stage: the stage; its ``coin`` tells whether the run is blended.
        everything: scale observed sites too; for a guide, whose factors belong to log q.
    """

    def __init__(self, stage: Stage, *, everything: bool = False) -> None:
        super().__init__()
        self.stage, self.everything = stage, everything

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate(msg) or (msg["is_observed"] and not self.everything):
            return
        if not (self.stage.coin or isinstance(msg["fn"], RoundLaw)):
            msg["scale"] = self.stage.entropy * msg["scale"]
