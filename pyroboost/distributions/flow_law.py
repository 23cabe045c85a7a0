"""The law of one flow, scored at the points that it draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyroboost.distributions._boosted_checks import check_points
from pyroboost.flows import Flow

__all__ = ["FlowLaw"]


class FlowLaw(TorchDistribution):
    r"""One flow over a base, :math:`z = f(z_0)` with :math:`z_0 \sim q_0`.

    .. math:: \log q(z) = \log q_0(z_0) - \log\Big|\det \frac{\partial f}{\partial z_0}\Big|

    Draws carry pathwise gradients. The last draw is remembered with its density, so that scoring
    it, as every ELBO and importance sampler of Pyro does, inverts nothing: flows without an
    inverse in closed form (planar, radial, Sylvester) serve as guides. Other points are scored
    through the inverse where the flow has one, and refused where it has none.

    Args:
        base: q_0, a distribution of vectors.  # (*B), event (D)
        flow: f.
        context: what an amortised flow depends on.  # (*B, width)
        validate_args: check values that are scored; Pyro's setting by default.

    Raises:
        TypeError: if it is no flow.
        ValueError: if shapes do not fit.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyroboost import flows
        >>> base = dist.Normal(torch.zeros(5, 2), 1.0).to_event(1)
        >>> q = FlowLaw(base, flows.planar(2, steps=3))
        >>> z = q.rsample((100,))
        >>> z.shape, q.log_prob(z).shape
        (torch.Size([100, 5, 2]), torch.Size([100, 5]))
        >>> try:
        ...     q.log_prob(z + 1.0)
        ... except ValueError as error:
        ...     print(str(error).split(";")[0])
        FlowLaw.log_prob: flow 'planar' has no inverse in closed form (step Planar)

    Reference:
        Rezende and Mohamed, Variational inference with normalizing flows (2015), Eq. 5-7.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - the name and form of torch
    support = constraints.real_vector

    def __init__(
        self,
        base: TorchDistribution,
        flow: Flow,
        *,
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(flow, Flow):
            raise TypeError(f"FlowLaw: flow is {type(flow).__name__}; give a pyroboost.flows.Flow.")
        if tuple(base.event_shape) != (flow.dim,):
            raise ValueError(
                f"FlowLaw: the base has event shape {tuple(base.event_shape)} and flow "
                f"'{flow.name}' is of dimension {flow.dim}; give a base of such vectors, for "
                "example by to_event(1)."
            )
        shape = base.batch_shape if context is None else _together(base, context)
        if flow.context and (context is None or context.shape[-1] != flow.context):
            came = "none" if context is None else f"of shape {tuple(context.shape)}"
            raise ValueError(
                f"FlowLaw: flow '{flow.name}' needs a context of width {flow.context}, and {came} "
                f"came; pass context= of shape (..., {flow.context})."
            )
        self.base = base if base.batch_shape == shape else base.expand(shape)
        self.flow, self.context = flow, context
        self._drawn: tuple[Tensor, int, Tensor] | None = None
        super().__init__(shape, base.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: FlowLaw | None = None) -> FlowLaw:
        """Repeat the distribution over more batch dimensions; flow and context are shared."""
        new: FlowLaw = self._get_checked_instance(FlowLaw, _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.Size(batch_shape)
        new.base, new._drawn = self.base.expand(new._batch_shape), None
        return new

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry a pathwise gradient: those of the base do."""
        return bool(self.base.has_rsample)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw points (*S, *B, D) with their pathwise gradient."""
        return self._draw(self.base.rsample(torch.Size(sample_shape)))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw points (*S, *B, D)."""
        return self._draw(self.base.sample(torch.Size(sample_shape)))

    def _draw(self, z0: Tensor) -> Tensor:
        value, log_det = self.flow(z0, self.context)
        self._drawn = value, value._version, self.base.log_prob(z0) - log_det
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q(z) in nats, of shape (*S, *B), for points (*S, *B, D).

        Raises:
            ValueError: if shapes do not fit, or if the flow has no inverse and these are not the
                points of the last draw.
        """
        if self._drawn is not None and value is self._drawn[0]:
            _, version, log_prob = self._drawn
            if value._version == version:  # else it was changed in place and is another point
                return log_prob
        expected = (*self.batch_shape, *self.event_shape)
        shape = check_points("FlowLaw.log_prob", value, expected, bool(self._validate_args))
        lacking = next((step for step in self.flow.steps if step.refusal is not None), None)
        if lacking is not None:
            raise ValueError(
                f"FlowLaw.log_prob: flow '{self.flow.name}' {lacking.refusal} (step "
                f"{lacking.label}); score the very tensor that this law drew last, as an ELBO "
                "does, or use a flow that runs both ways, such as flows.realnvp."
            )
        z0, log_det = self.flow.inverse(value.expand(shape), self.context)
        found: Tensor = self.base.log_prob(z0) + log_det
        return found

    def __repr__(self) -> str:
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"FlowLaw({self.flow.name}{batch}, event_shape={tuple(self.event_shape)})"


def _together(base: TorchDistribution, context: Tensor) -> torch.Size:
    """Return the batch shape that base and contexts make together."""
    try:
        return torch.Size(np.broadcast_shapes(base.batch_shape, context.shape[:-1]))
    except ValueError:
        raise ValueError(
            f"FlowLaw: a context of shape {tuple(context.shape)} does not fit a base of batch "
            f"shape {tuple(base.batch_shape)}; give one row for each."
        ) from None
