"""The losses of a round, and what its weights are judged by from epoch to epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroboost.distributions import Components
from pyroboost.handlers import is_plate
from pyroboost.infer._round_law import RoundLaw, Stage

__all__ = ["DrawnELBO", "MappedELBO", "MixtureELBO"]


class DrawnELBO(Trace_ELBO):
    """The bound by ordinary draws of the guide, all in one run where the programs allow it.

    Args:
        num_particles: draws of the loss.
        nesting: number of nested plates.
        stacks: whether draws may be one more dimension on the left.
    """

    def __init__(self, num_particles: int, nesting: int, *, stacks: bool) -> None:
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=nesting,
            vectorize_particles=stacks and num_particles > 1,
        )
        self.nesting, self.stacks = nesting, stacks  # Pyro counts its own plate as well

    def judge(self, num_particles: int) -> DrawnELBO:
        """Return the estimator of the held-out bound."""
        return DrawnELBO(num_particles, self.nesting, stacks=self.stacks)


class MappedELBO:
    """The bound of a guide that draws nothing but its boosted site, by `torch.vmap`.

    The draws are taken from the round's law in one batch, and model and guide are mapped over
    them, which asks of a model no more than to run on one of them.

    Args:
        num_particles: draws of the loss.
        nesting: number of nested plates.
    """

    def __init__(self, num_particles: int, nesting: int) -> None:
        self.num_particles, self.max_plate_nesting = num_particles, nesting

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any
    ) -> Tensor:
        """Return minus the mean bound of the draws, in nats."""
        sites = poutine.trace(guide).get_trace(*args).nodes
        (name,) = (n for n, s in sites.items() if isinstance(s.get("fn"), RoundLaw))
        site = sites[name]
        drawn = site["fn"].rsample((self.num_particles,))
        own = site["scale"] * site["fn"].log_prob(drawn)

        def rest(value: Tensor) -> Tensor:
            inner = poutine.trace(_placed(name, value)(guide)).get_trace(*args)
            outer = poutine.trace(poutine.replay(model, trace=inner)).get_trace(*args)
            inner.compute_log_prob(lambda n, _: n != name)
            outer.compute_log_prob()
            return _total(outer) - _total(inner)

        with pyro.validation_enabled(False):  # which would ask for values of tensors
            joint = torch.vmap(rest, randomness="different")(drawn)
        loss: Tensor = (own - joint).mean()
        return loss

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> float:
        """Return the same as a number, without gradients."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args))

    def judge(self, num_particles: int) -> MappedELBO:
        """Return the estimator of the held-out bound."""
        return MappedELBO(num_particles, self.max_plate_nesting)


class MixtureELBO:
    r"""The bound of the whole mixture, $\sum_c w_c E_{g_c}[\log p - \log q_w]$, for a round.

    The term of the component in training has, but for the factor w_c, the gradient of that flow,
    and a value that is not the bound's: it is the higher the more the component lies on the
    others. So epochs are judged by all terms, and all terms train whatever else trains: encoder,
    decoder and base learn from the draws of every component.

    Args:
        elbo: the bound of the stage's component alone.
        stage: the stage, whose objective is "mixture".
        components: the flows and their weights of now.
        everything: whether all terms train, or the component's own.
    """

    def __init__(
        self,
        elbo: DrawnELBO | MappedELBO,
        stage: Stage,
        components: Components,
        *,
        everything: bool,
    ) -> None:
        self.elbo, self.stage, self.components = elbo, stage, components
        self.everything, self.max_plate_nesting = everything, elbo.max_plate_nesting

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any
    ) -> Tensor:
        """Return minus the bound, or the component's own term of it without its weight."""
        if self.everything:
            total: Tensor = self._sum(self.elbo.differentiable_loss, model, guide, *args)
            return total
        return self.elbo.differentiable_loss(model, guide, *args)

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> float:
        """Return minus the bound as a number, without gradients."""
        with torch.no_grad():
            return float(self._sum(self.elbo.loss, model, guide, *args))

    def judge(self, num_particles: int) -> MixtureELBO:
        """Return the estimator of the held-out bound."""
        return MixtureELBO(
            self.elbo.judge(num_particles), self.stage, self.components, everything=True
        )

    def _sum(self, term: Callable[..., Any], *args: Any) -> Any:
        own, weights = self.stage.component, self.components.mixing().detach()
        try:
            total: Any = 0.0
            for c in (weights > 0).nonzero().flatten().tolist():
                self.stage.component = c
                total = total + float(weights[c]) * term(*args)
        finally:
            self.stage.component = own
        return total


class _placed(Messenger):
    """Put a value at a site instead of a draw."""

    def __init__(self, name: str, value: Tensor) -> None:
        super().__init__()
        self.name, self.value = name, value

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            msg["value"] = self.value


def _total(trace: Any) -> Tensor:
    """Sum the log densities that were computed."""
    sites = [s for s in trace.nodes.values() if "log_prob" in s and not is_plate(s)]
    return torch.stack([site["log_prob"].sum() for site in sites] or [torch.zeros(())]).sum()
