"""The bound of a whole boosted mixture as a loss: draws from every component, exact weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import constraints

from pyroboost.distributions import BoostedFlow
from pyroboost.infer._round_law import at_site

__all__ = ["StratifiedELBO"]


class _Stratum(TorchDistribution):
    """Draws of one component, scored by the whole mixture."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - the name and form of torch
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mixture: BoostedFlow, component: int) -> None:
        self.mixture, self.component = mixture, component
        super().__init__(mixture.batch_shape, mixture.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Stratum:
        return _Stratum(self.mixture.expand(batch_shape), self.component)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.mixture.rsample_component(self.component, sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.mixture.log_prob(value)


class StratifiedELBO:
    r"""The bound of a guide whose one boosted site is a mixture, with no noise in the component.

    .. math:: \mathcal{L} = \sum_c w_c\, E_{g_c}\Big[\log p(x, z) -
        \log \sum_j w_j\, g_j(z \mid x)\Big]

    Every component of positive weight is drawn from, with its pathwise gradient, so that flows,
    base, encoder and decoder have the gradient of the true bound, and so have the weights within
    `Components.learning_weights()`; otherwise they stay. It costs one run of model and guide for
    each of the C components, and C densities in each. All rows of the site (its batch shape) have
    one component in a run, so rows must not act on each other given the guide's other sites, as
    the data of a VAE do not; `boost` and `fit` look, and refuse a model that couples them.

    Args:
        num_particles: draws of each component.
        max_plate_nesting: number of nested plates, counted from the right.
        vectorize_particles: whether the draws are one more dimension on the left.

    Raises:
        ValueError: the guide samples no site from a BoostedFlow, or several.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyroboost import flows
        >>> from pyroboost.distributions import BoostedFlow
        >>> base = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        >>> def model():
        ...     pyro.sample("z", base)
        >>> def guide():
        ...     pyro.sample("z", BoostedFlow(base, [flows.affine(1, spread=0.0)] * 2))
        >>> loss = StratifiedELBO(10, max_plate_nesting=0)
        >>> abs(loss.loss(model, guide)) < 1e-5
        True

    Reference:
        Giaquinto and Banerjee, Gradient boosted flows (2020), Eq. 8 and 9; Morningstar et al.,
        Automatic differentiation variational inference with mixtures (2021), Eq. 5.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        max_plate_nesting: int = 1,
        vectorize_particles: bool = False,
    ) -> None:
        if num_particles < 1:
            raise ValueError(f"StratifiedELBO: num_particles is {num_particles}; take 1 or more.")
        self.num_particles = num_particles
        self.max_plate_nesting = max_plate_nesting
        self.vectorize_particles = vectorize_particles
        self._elbo = Trace_ELBO(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles and num_particles > 1,
        )

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return minus the bound of one draw (or several) from every component, in nats."""
        mixtures: list[BoostedFlow] = []

        def stratum(c: int | None) -> Callable[[BoostedFlow], TorchDistribution]:
            def law(q: BoostedFlow) -> TorchDistribution:
                mixtures[:] = [q]
                own = q._active[0] if c is None else c
                return _Stratum(q, own)

            return law

        first = self._elbo.differentiable_loss(
            model, at_site(stratum(None))(guide), *args, **kwargs
        )
        active = mixtures[0]._active
        total = mixtures[0].weights[active[0]] * first
        for c in active[1:]:
            program = at_site(stratum(c))(guide)
            loss = self._elbo.differentiable_loss(model, program, *args, **kwargs)
            total = total + mixtures[0].weights[c] * loss
        return total

    def judge(self, num_particles: int) -> Trace_ELBO:
        """Return the plain bound by so many draws of the mixture, which judges a fit."""
        return Trace_ELBO(
            num_particles=num_particles,
            max_plate_nesting=self.max_plate_nesting,
            vectorize_particles=self.vectorize_particles and num_particles > 1,
        )

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Return the same as a number, without gradients."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))
