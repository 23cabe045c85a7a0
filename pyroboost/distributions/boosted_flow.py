"""A mixture of normalising flows over one base, with its exact density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyroboost.distributions._boosted_checks import (
    check_components,
    check_context,
    check_points,
    check_weights,
)
from pyroboost.distributions._boosted_draws import Draw, draw, rows_of, score_draw
from pyroboost.distributions._boosted_scores import score_all, score_base
from pyroboost.distributions._boosted_sums import ComponentSums, Strata
from pyroboost.flows import Flow

__all__ = ["BoostedFlow", "Strata"]


class BoostedFlow(ComponentSums):
    r"""A convex combination of flows over one base, scored exactly.

    .. math:: q(z) = \sum_c w_c\, g_c(z), \qquad
        g_c(z) = q_0\big(f_c^{-1}(z)\big) \Big|\det \frac{\partial f_c^{-1}}{\partial z}\Big|

    1. **Density.** `log_prob` is the logarithm of that sum over all components, never the density
       of one that was drawn.
    2. **Draws.** `sample` draws the component of every example by itself.
    3. **Gradients.** The choice of a component has no pathwise gradient, so none would reach the
       weights: `has_rsample` is True only while one component alone has all the weight. Each
       component has a gradient (`rsample_component`), and `stratified` draws from all of them,
       whose weighted sum has the gradient of everything.
    4. **Batches.** The base may be conditional, with a batch shape *B of its own; all components
       share it. Amortised flows take the `context`, whose rows belong to that batch shape.
    5. **Cost.** Components of one shape are run side by side, each step once for all of them;
       others, transforms of Pyro among them, one after another. What exceeds `memory` is done in
       blocks of rows: with gradients on the numbers are the same, but each block stays.

    Components of weight 0 are neither drawn nor evaluated: they and their weights get no
    gradient from `log_prob`. `log_prob_components` evaluates them too.

    Args:
        base: q_0, a distribution of vectors.  # (*B), event (D)
        components: C flows, each with an inverse in closed form. They are used as they are, not
            copied, and their parameters are theirs: a distribution registers none.
        weights: w, from zero up, with sum one; equal by default. Fixed weights are a buffer of
            the module that builds the distribution.  # (C)
        logits: log w up to a constant, instead of `weights`: the parameterisation to learn
            weights by gradients, free of constraints. Minus infinity is a weight of 0.  # (C)
        context: what amortised flows depend on.  # (*B, width)
        allow_slow: accept autoregressive components, whose density costs D network passes.
        memory: bound in MiB on what the flows hold at once, beside the points, a few copies of
            them and the densities, when densities or draws are made without gradients.
        validate_args: check values that are scored; Pyro's setting by default.

    Raises:
        TypeError: if a component is not a flow.
        ValueError: if shapes do not fit, weights are not a convex combination, or a component has
            no inverse.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyroboost import flows
        >>> base = dist.Normal(torch.zeros(5, 2), 1.0).to_event(1)
        >>> q = BoostedFlow(base, [flows.realnvp(2), flows.lu(2)], torch.tensor([0.7, 0.3]))
        >>> q
        BoostedFlow(realnvp: 0.7, lu: 0.3, batch_shape=(5,), event_shape=(2,))
        >>> z = q.sample((100,))
        >>> z.shape, q.log_prob(z).shape, q.log_prob_components(z).shape
        (torch.Size([100, 5, 2]), torch.Size([100, 5]), torch.Size([100, 5, 2]))

    Reference:
        Giaquinto and Banerjee, Gradient boosted flows (2020), Eq. 7.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - the name and form of torch
    support = constraints.real_vector

    def __init__(
        self,
        base: TorchDistribution,
        components: Sequence[Flow],
        weights: Tensor | None = None,
        *,
        logits: Tensor | None = None,
        context: Tensor | None = None,
        allow_slow: bool = False,
        memory: float = 256.0,
        validate_args: bool | None = None,
    ) -> None:
        if not memory > 0:
            raise ValueError(f"BoostedFlow: memory is {memory}; give a bound in MiB, above 0.")
        self.components, self.memory = tuple(components), memory
        check_components(base, self.components, allow_slow)
        self._given = check_weights(weights, logits, self.components)
        self._by_logits = logits is not None
        shape = check_context(base, self.components, context)
        self.base = base if base.batch_shape == shape else base.expand(shape)
        self.context = context
        super().__init__(shape, base.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: BoostedFlow | None = None) -> BoostedFlow:
        """Repeat the distribution over more batch dimensions; flows and context are shared."""
        new: BoostedFlow = self._get_checked_instance(BoostedFlow, _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.Size(batch_shape)
        new.base = self.base.expand(new._batch_shape)
        return new

    @property
    def log_weights(self) -> Tensor:
        """The logarithms of the weights, (C); minus infinity for a weight of 0."""
        # Taken anew each time, so that one distribution serves several backward passes.
        if self._by_logits:
            return self._given.log_softmax(-1)
        positive = self._given > 0  # a weight of zero gets a gradient of zero, not infinity
        logs = torch.where(positive, self._given, 1.0).log()
        return torch.where(positive, logs, -math.inf)

    @property
    def _active(self) -> list[int]:
        """The components of positive weight."""
        given = self._given.detach()
        return (given > (-math.inf if self._by_logits else 0)).nonzero().flatten().tolist()

    @property
    def weights(self) -> Tensor:
        """The weights w, (C)."""
        return self.log_weights.exp()

    # The density

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q(z) in nats, of shape (*S, *B), for points (*S, *B, D)."""
        value, active = self._points(value, "log_prob"), self._active
        return self._mix(active, self._scores(active, value))

    def log_prob_components(self, value: Tensor) -> Tensor:
        """Return log g_c(z) of every component, those of weight 0 included.

        Args:
            value: points.  # (*S, *B, D)

        Returns:
            Log densities in nats.  # (*S, *B, C)
        """
        value = self._points(value, "log_prob_components")
        return torch.stack(self._scores(range(len(self.components)), value), -1)

    def _points(self, value: Tensor, method: str) -> Tensor:
        """Check points and give them the batch's shape."""
        expected = (*self.batch_shape, *self.event_shape)
        where = f"BoostedFlow.{method}"
        return value.expand(check_points(where, value, expected, bool(self._validate_args)))

    def _scores(self, which: Sequence[int], value: Tensor) -> list[Tensor]:
        """Return log g_c of some components at points that any component may have drawn."""
        flows = [self.components[c] for c in which]
        return score_all(self.base, flows, value, self.context, self.memory)

    def _score(self, c: int, value: Tensor) -> Tensor:
        """Return log g_c of one component."""
        return self._scores([c], value)[0]

    def _mix(self, which: Sequence[int], scores: Sequence[Tensor]) -> Tensor:
        """Return the log of the weighted sum of component densities."""
        terms = torch.stack([*scores])
        log_weights = self.log_weights[[*which]].to(terms.dtype)
        return (log_weights.view(-1, *[1] * (terms.dim() - 1)) + terms).logsumexp(0)

    # Draws

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw points (*S, *B, D), the component of each by itself."""
        return self._draw(sample_shape).value

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry a pathwise gradient: one component has all the weight."""
        fixed = not (self._by_logits and self._given.requires_grad)
        return fixed and len(self._active) == 1 and bool(self.base.has_rsample)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw points (*S, *B, D) with their pathwise gradient, if one component has all weight."""
        if self.has_rsample:
            return self.rsample_component(self._active[0], sample_shape)
        raise NotImplementedError(
            "BoostedFlow.rsample: the choice of a component has no pathwise gradient, so the "
            "weights would get none; use rsample_component for one component or stratified for "
            "all of them."
        )

    @torch.no_grad()
    def sample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Draw points and score them at once, without gradients.

        The density of the component that drew a point comes from the draw itself; only the
        others are inverted.

        Args:
            sample_shape: shape (*S) of the draws.

        Returns:
            z, and log q(z) in nats.  # (*S, *B, D), (*S, *B)
        """
        made, flows = self._draw(sample_shape), self._flows
        scores = score_draw(self.base, made, flows, self.context, self.memory)
        return made.value, self._mix([*flows], scores)

    @property
    def _flows(self) -> dict[int, Flow]:
        """The components of positive weight, by their numbers."""
        return {c: self.components[c] for c in self._active}

    def _draw(self, sample_shape: Any) -> Draw:
        """Draw points, each by its own component."""
        z0 = self.base.sample(torch.Size(sample_shape))
        return draw(z0, self._choose(z0.shape[:-1]), self._flows, self.context, self.memory)

    def _rows(self, rows: Tensor) -> Tensor | None:
        """Return the contexts of some of the draws."""
        return rows_of(self.context, rows)

    def _choose(self, shape: torch.Size) -> Tensor:
        """Draw a component for every example."""
        count = shape.numel()
        if not count:
            return self.log_weights.new_zeros(shape, dtype=torch.long)
        return torch.multinomial(self.weights, count, replacement=True).reshape(shape)

    def rsample_component(self, c: int, sample_shape: Any = ()) -> Tensor:
        """Draw points (*S, *B, D) from component c, with their pathwise gradient."""
        return self.rsample_component_and_log_prob(c, sample_shape)[0]

    def rsample_component_and_log_prob(
        self, c: int, sample_shape: Any = ()
    ) -> tuple[Tensor, Tensor]:
        """Draw points from component c and give its own log density there.

        Both carry the pathwise gradient to the base and to flow c, and to no other.

        Args:
            c: the component, counted from 0, or from the end if negative.
            sample_shape: shape (*S) of the draws.

        Returns:
            z, and log g_c(z), not that of the mixture, in nats.  # (*S, *B, D), (*S, *B)

        Raises:
            IndexError: if there is no such component.
            NotImplementedError: if gradients are on and the base has none.
        """
        if not -len(self.components) <= c < len(self.components):
            raise IndexError(f"BoostedFlow: no component {c}; there are {len(self.components)}.")
        z0 = self._source(sample_shape)
        value, log_det = self.components[c](z0, self.context)
        return value, score_base(self.base, z0) - log_det

    def _source(self, sample_shape: Any) -> Tensor:
        """Draw from the base, with its pathwise gradient if it has one."""
        if torch.is_grad_enabled() and not self.base.has_rsample:
            raise NotImplementedError(
                f"BoostedFlow: the base {type(self.base).__name__} has no pathwise gradient; give "
                "one that has, or draw under torch.no_grad()."
            )
        make = self.base.rsample if self.base.has_rsample else self.base.sample
        return make(torch.Size(sample_shape))

    def __repr__(self) -> str:
        pairs = zip(self.components, self.weights.tolist(), strict=True)
        parts = ", ".join(f"{flow.name}: {weight:.3g}" for flow, weight in pairs)
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"BoostedFlow({parts}{batch}, event_shape={tuple(self.event_shape)})"
