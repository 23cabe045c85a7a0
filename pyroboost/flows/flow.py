"""A flow: a list of steps that is run one way or the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyro.distributions.conditional import ConditionalTransform, ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions import Transform

from pyroboost.flows.borrowed import Borrowed
from pyroboost.flows.step import Conditioned, Step, fit_context

__all__ = ["Flow"]


class Flow(ConditionalTransformModule):
    r"""A chain of steps, :math:`z = f_K \circ \cdots \circ f_1(z_0)`.

    .. math:: \log q(z) = \log q_0(z_0) - \sum_k \log\Big|\det
        \frac{\partial f_k}{\partial z_{k-1}}\Big|

    Steps are this package's, Pyro's or torch's transforms of vectors (elementwise ones count as
    such), or other flows. A flow is also a Pyro conditional transform: `condition(context)` is
    a transform for `TransformedDistribution`, which caches nothing.

    Args:
        steps: the steps in the order in which they make z from z_0.
        dim: D; needed only if no step says it.
        context: width C of the context; needed only if amortised steps come from Pyro, which
            do not say it.
        name: what messages call the flow.

    Raises:
        TypeError: if a step is not a transform.
        ValueError: if steps differ in dimension or context.

    Example:
        >>> import torch
        >>> from pyroboost.flows import LU, Affine, Permutation
        >>> flow = Flow([LU(3), Permutation([2, 1, 0]), Affine(3)], name="mine")
        >>> flow
        Flow('mine', dim=3: LU, Permutation, Affine)
        >>> z, log_det = flow(torch.randn(5, 3))
        >>> z.shape, log_det.shape, flow.inverse(z)[0].shape
        (torch.Size([5, 3]), torch.Size([5]), torch.Size([5, 3]))

    Reference:
        Rezende and Mohamed, Variational inference with normalizing flows (2015), Eq. 5-7.
    """

    def __init__(
        self,
        steps: Iterable[Step | Flow | Transform | ConditionalTransform],
        *,
        dim: int | None = None,
        context: int | None = None,
        name: str = "flow",
    ) -> None:
        super().__init__()
        listed: list[Any] = []
        for step in steps:
            listed += step.steps if isinstance(step, Flow) else [_as_step(step, context or 0)]
        self.steps: Any = nn.ModuleList(listed)
        self.dim = _common(name, "dim", dim, [s.dim for s in listed if s.dim is not None])
        self.context = _common(name, "context", context, [s.context for s in listed if s.context])
        self.name = name

    def forward(self, z0: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the flow forwards.

        Args:
            z0: points of the base.  # (*S, D)
            context: for an amortised flow, contexts whose batch shape broadcasts with *S; a flow
                without amortised steps ignores it.  # (*B, C)

        Returns:
            z, and the log of the absolute determinant of dz/dz_0 in nats.  # (*S, D), (*S)

        Raises:
            ValueError: if shapes do not fit or the context is missing.
        """
        return self._run(*self._fit("forward", z0, context), inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the flow backwards: return z_0 with f(z_0) = z, and log |det dz_0/dz|.

        Raises:
            ValueError: as `forward`, and if a step has no inverse.
        """
        return self._run(*self._fit("inverse", z, context), inverse=True)

    push, pull = forward, inverse  # a flow can stand where a step can

    def _run(self, z: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """Run all steps; shapes have been checked once for all of them."""
        log_det: Tensor | None = None
        for step in reversed(self.steps) if inverse else self.steps:
            given = context if step.context else None
            z, term = step._pull(z, given) if inverse else step._push(z, given)
            log_det = term if log_det is None else log_det + term
        return z, z.new_zeros(z.shape[:-1]) if log_det is None else log_det

    def condition(self, context: Tensor | None = None) -> Transform:
        """Return the transform for a context (*B, C), or for none."""
        return Conditioned(self, context)

    @property
    def invertible(self) -> bool:
        """Whether every step has an inverse in closed form or, for autoregressive ones, at all."""
        return all(step.refusal is None for step in self.steps)

    @property
    def slow(self) -> bool:
        """Whether a step is run one coordinate at a time in one of its directions."""
        return any(step.slow for step in self.steps)

    def _fit(self, method: str, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        where = f"Flow.{method} ('{self.name}')"
        if z.shape[-1:] != (self.dim,):
            raise ValueError(
                f"{where}: points have shape {tuple(z.shape)}; their last dimension must be "
                f"{self.dim}."
            )
        return fit_context(where, z, context, self.context) if self.context else (z, None)

    def __repr__(self) -> str:
        steps = ", ".join(step.label for step in self.steps) or "identity"
        context = f", context={self.context}" if self.context else ""
        return f"Flow('{self.name}', dim={self.dim}{context}: {steps})"


def _as_step(step: Any, context: int) -> Step | Borrowed:
    if isinstance(step, Step | Borrowed):
        return step
    if isinstance(step, Transform | ConditionalTransform):
        return Borrowed(step, context=context)
    raise TypeError(
        f"Flow: a step is {type(step).__name__}; give steps of pyroboost.flows, flows, or "
        "transforms of Pyro or torch."
    )


def _common(name: str, what: str, given: int | None, found: list[int]) -> int:
    """Return the one value that everything agrees on."""
    values = sorted({*found} | (set() if given is None else {given}))
    if not values and what == "context":
        return 0
    if len(values) != 1:
        said = f"has steps of {what} {values}" if values else f"has no step that says its {what}"
        raise ValueError(f"Flow ('{name}'): it {said}; give steps of one {what}, or pass {what}=.")
    return values[0]
