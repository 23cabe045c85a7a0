"""The flows of a boosted mixture and their weights, as a module that guides and models hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyroboost.distributions.boosted_flow import BoostedFlow
from pyroboost.flows import Flow, check_invertible

__all__ = ["Components"]


class Components(nn.Module):
    r"""Flows :math:`f_1, \dots, f_C` and weights on the simplex, to be boosted.

    Called with a base it is the mixture :math:`q(z) = \sum_c w_c\, g_c(z)` of its flows. At first
    the weight of component 0 is one and that of every other zero: those are not yet trained, and
    cost nothing. Weights are a buffer, since boosting solves for them (`infer.boost`); flows are
    trained by gradients. A guide of your own can be boosted if it holds one such module and
    samples a site from what it returns.

    Args:
        flow: a function without arguments that builds one new flow, such as
            `lambda: flows.realnvp(2)`, or a list of C of these, for components that differ.
        count: C; not needed with a list.
        allow_slow: accept autoregressive flows, whose density costs D network passes.

    Raises:
        TypeError: if a function builds no flow.
        ValueError: if there is no component, or a flow has no inverse in closed form.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyroboost import flows
        >>> q = Components(lambda: flows.realnvp(2), 3)
        >>> q(dist.Normal(torch.zeros(5, 2), 1.0).to_event(1))
        BoostedFlow(realnvp: 1, realnvp: 0, realnvp: 0, batch_shape=(5,), event_shape=(2,))

    Reference:
        Giaquinto and Banerjee, Gradient boosted flows (2020), Eq. 7.
    """

    weights: Tensor
    logits: nn.Parameter | None

    def __init__(
        self,
        flow: Callable[[], Flow] | Sequence[Callable[[], Flow]],
        count: int | None = None,
        *,
        allow_slow: bool = False,
    ) -> None:
        super().__init__()
        self._make = _builders(flow, count)
        self.allow_slow = allow_slow
        self.flows = nn.ModuleList([self._built(c) for c in range(len(self._make))])
        like = next(self.flows.parameters(), torch.ones(()))
        weights = torch.zeros(len(self.flows), dtype=like.dtype, device=like.device)
        weights[0] = 1.0
        self.register_buffer("weights", weights)
        self.register_parameter("logits", None)

    def __len__(self) -> int:
        """Return C."""
        return len(self.flows)

    @property
    def active(self) -> list[int]:
        """The components of positive weight."""
        found: list[int] = (self.weights > 0).nonzero().flatten().tolist()
        return found

    def forward(self, base: TorchDistribution, context: Tensor | None = None) -> BoostedFlow:
        """Return the mixture over a base.

        Args:
            base: q_0.  # (*B), event (D)
            context: what amortised flows depend on.  # (*B, width)
        """
        flows: list[Flow] = list(self.flows)  # type: ignore[arg-type]
        weights, logits = (self.weights, None) if self.logits is None else (None, self._spread())
        return BoostedFlow(
            base, flows, weights, logits=logits, context=context, allow_slow=self.allow_slow
        )

    @contextmanager
    def learning_weights(self) -> Iterator[None]:
        """Let the weights of active components be trained as a parameter; store them at the end.

        Within the context the module has one more parameter, the logits of its active components,
        and the mixtures that it returns have their softmax for weights.
        """
        if self.logits is not None:
            raise RuntimeError("Components.learning_weights: it is already open; open it once.")
        active = self.active
        self.logits = nn.Parameter(self.weights[active].log())
        try:
            yield
        finally:
            with torch.no_grad():
                self.weights[active] = self.logits.softmax(-1)
            self.logits = None

    def mixing(self) -> Tensor:
        """Return the weights as they are used now, on the way of being learnt or stored, (C)."""
        return self.weights if self.logits is None else self._spread().softmax(-1)

    def _spread(self) -> Tensor:
        """Return the logits of all components; those that are not active have minus infinity."""
        assert self.logits is not None
        logits = torch.full_like(self.weights, -math.inf)
        return logits.index_put(((self.weights > 0).nonzero().flatten(),), self.logits)

    def restart(self, c: int) -> None:
        """Put a new flow, just built, in the place of component c; weights stay."""
        fresh = self._built(c)
        like = next(self.flows[c].parameters(), self.weights)
        fresh.train(self.flows[c].training)
        self.flows[c] = fresh.to(device=like.device, dtype=like.dtype)

    def _built(self, c: int) -> Flow:
        flow = self._make[c]()
        if not isinstance(flow, Flow):
            raise TypeError(
                f"Components: the function of component {c} built {type(flow).__name__}; let it "
                "return a pyroboost.flows.Flow."
            )
        check_invertible(flow, allow_slow=self.allow_slow, where=f"Components: component {c}")
        return flow

    def extra_repr(self) -> str:
        """Name the weights."""
        return "weights=[" + ", ".join(f"{w:.3g}" for w in self.weights.tolist()) + "]"


def _builders(
    flow: Callable[[], Flow] | Sequence[Callable[[], Flow]], count: int | None
) -> list[Callable[[], Flow]]:
    if callable(flow) and not isinstance(flow, Sequence):
        if count is None or count < 1:
            raise ValueError(f"Components: count is {count}; say how many flows, one or more.")
        return [flow] * count
    if not flow or count not in (None, len(flow)):
        raise ValueError(
            f"Components: {len(flow)} functions came for count={count}; give one for each "
            "component."
        )
    return list(flow)
