"""The flows of a mixture over a fixed base, and the Pyro programs that read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import AffineTransform, constraints

from pyroboost.distributions import BoostedFlow, Components
from pyroboost.flows import Flow
from pyroboost.models._finite_mixture import Parts

__all__ = ["Builder", "FlowParts", "standard_normal"]

Builder = Callable[[int], Flow]


def standard_normal(zero: Tensor) -> TorchDistribution:
    """Return N(0, I), of the shape, type and device of a tensor of zeros (D,)."""
    return dist.Normal(zero, torch.ones_like(zero)).to_event(1)


def _numbers(component: Tensor) -> list[int]:
    return sorted(set(component.flatten().tolist()))


class _Chosen(TorchDistribution):
    """Draws of a boosted flow whose component is given, one for each point.

    Args:
        mixture: the flows, without a batch shape.
        component: their numbers.  # (*B)
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - the name and form of torch
    support = constraints.real_vector

    def __init__(self, mixture: BoostedFlow, component: Tensor) -> None:
        self.mixture, self.component = mixture, component
        super().__init__(component.shape, mixture.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Chosen:
        """Repeat the choice over more batch dimensions."""
        return _Chosen(self.mixture, self.component.expand(batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw points (*S, *B, D)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        z0 = self.mixture.base.sample(shape)
        component, value = self.component.expand(shape), z0.clone()
        for c in _numbers(component):
            rows = component == c
            value[rows] = self.mixture.components[int(c)](z0[rows])[0]
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log g_c of points (*S, *B, D), each by its own component, (*S, *B)."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)  # type: ignore[no-untyped-call]
        value, component = value.expand(*shape, -1), self.component.expand(shape)
        found = value.new_zeros(shape)
        for c in _numbers(component):
            rows = component == c
            z0, log_det = self.mixture.components[int(c)].inverse(value[rows])
            found = found.masked_scatter(rows, self.mixture.base.log_prob(z0) + log_det)
        return found


class FlowParts(Parts):
    """The flows, their weights, and the scale of the data, with the programs that read them.

    Args:
        dim: size D of a datum.
        flow: builds a flow of D coordinates; or one such function for each component.
        count: the number of components.
        base: gives the base distribution for zeros (D,).
        visible: name of the data's site.
        hidden: name of the component's site.
        allow_slow: whether autoregressive flows are accepted.
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        dim: int,
        flow: Builder | Sequence[Builder],
        count: int | None,
        base: Callable[[Tensor], TorchDistribution],
        visible: str,
        hidden: str,
        allow_slow: bool,
    ) -> None:
        super().__init__(visible, hidden)
        several = isinstance(flow, Sequence)
        built = (
            [partial(f, dim) for f in flow] if isinstance(flow, Sequence) else partial(flow, dim)
        )
        self.flows = Components(built, None if several else count, allow_slow=allow_slow)
        self.builders = list(flow) if isinstance(flow, Sequence) else [flow] * len(self.flows)
        self.base = base
        like = self.flows.weights
        self.register_buffer("loc", like.new_zeros(dim))
        self.register_buffer("scale", like.new_ones(dim))
        wrong = [f.dim for f in self.flows.flows if f.dim != dim or f.context]
        if wrong or len(self.flows) != (count or len(self.flows)):
            raise ValueError(
                f"FlowMixture: {len(self.flows)} flows came for {count} components of dimension "
                f"{dim}, and {len(wrong)} of them have another dimension or take a context; build "
                "one for each, of that dimension and without context."
            )

    def mixture(self) -> BoostedFlow:
        """Return the mixture of the standardised data, (x - loc) / scale."""
        return self.flows(self.base(torch.zeros_like(self.loc)))

    def place(self, x: Tensor, weights: Tensor | None) -> None:
        """Take mean and standard deviation of data for location and scale."""
        share = torch.ones(len(x)) if weights is None else weights
        share = (share.double() / share.double().sum()).to(x.device)
        loc = share @ x.double()
        scale = (share @ (x.double() - loc).square()).sqrt()
        constant = ~(scale > 1e-12 * (1 + loc.abs()))
        if bool(constant.any()):
            raise ValueError(
                f"FlowMixture: columns {constant.nonzero().flatten().tolist()} of the data are "
                "constant, so that they have no density; leave these out."
            )
        # New tensors: a component taken out of a mixture may share the old ones.
        self.loc, self.scale = loc.to(self.loc), scale.to(self.scale)

    def standardise(self, x: Tensor) -> Tensor:
        """Return (x - loc) / scale."""
        return (x - self.loc) / self.scale

    @property
    def log_det(self) -> Tensor:
        """What the scale takes from every log density, the sum of log scale."""
        return self.scale.log().sum()

    def log_weights(self) -> Tensor:
        """Return log w_c of every component, minus infinity for a weight of 0, (K,)."""
        return self.mixture().log_weights

    def scores(self, x: Tensor, which: Sequence[int] | None = None) -> Tensor:
        """Return log g_c of some components, by default those of positive weight, (..., C)."""
        self.check(x)
        which = self.flows.active if which is None else which
        chosen: list[Flow] = [self.flows.flows[c] for c in which]  # type: ignore[misc]
        zero = torch.zeros_like(self.loc)
        mixture = BoostedFlow(self.base(zero), chosen, allow_slow=self.flows.allow_slow)
        return mixture.log_prob_components(self.standardise(x)) - self.log_det

    def joint(self, x: Tensor) -> Tensor:
        """Return log m(x, c) of every component, (..., K); those of weight 0 are not evaluated."""
        log_weights, active = self.log_weights(), self.flows.active
        terms = self.scores(x) + log_weights[active]
        if len(active) == len(log_weights):
            return terms
        found = terms.new_full((*terms.shape[:-1], len(log_weights)), -math.inf)
        found[..., active] = terms
        return found

    def log_density(self, x: Tensor) -> Tensor:
        """Return log m(x), (...)."""
        return (self.scores(x) + self.log_weights()[self.flows.active]).logsumexp(-1)

    def check(self, x: Tensor) -> None:
        """Refuse data of another dimension."""
        dim = len(self.loc)
        if x.dim() < 2 or x.shape[-1] != dim:
            raise ValueError(
                f"FlowMixture: site '{self.visible}' got shape {tuple(x.shape)}; this mixture "
                f"takes data of shape (N, {dim})."
            )
        if pyro.settings.get("validate_distributions_torch"):
            bad = ~x.isfinite().all(-1)
            if bool(bad.any()):
                raise ValueError(
                    f"FlowMixture: {int(bad.sum())} of {bad.numel()} data hold NaN or infinity at "
                    f"site '{self.visible}'; drop or fill them first."
                )

    def _placed(self, law: TorchDistribution) -> TorchDistribution:
        """Return the law of x from that of the standardised data."""
        place = AffineTransform(self.loc, self.scale, event_dim=1)
        found: TorchDistribution = dist.TransformedDistribution(law, [place])
        return found

    def model(self, x: Tensor) -> Tensor:
        """Draw c ~ Categorical(w), then x by flow c."""
        self.check(x)
        with pyro.plate("data", x.shape[-2], dim=-1):
            c = pyro.sample(self.hidden, dist.Categorical(logits=self.log_weights()))
            return pyro.sample(self.visible, self._placed(_Chosen(self.mixture(), c)), obs=x)

    def marginal(self, x: Tensor) -> Tensor:
        """Draw x ~ sum_c w_c g_c, without the component."""
        self.check(x)
        with pyro.plate("data", x.shape[-2], dim=-1):
            return pyro.sample(self.visible, self._placed(self.mixture()), obs=x)
