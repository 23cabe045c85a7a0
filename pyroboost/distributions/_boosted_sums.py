"""Expectations under a mixture of flows, as sums over its components."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyroboost.distributions._boosted_scores import push_all, score_base, score_each
from pyroboost.flows import Flow

__all__ = ["ComponentSums", "Strata"]


class Strata(NamedTuple):
    """Draws from every component, and the weights that make sums over them expectations."""

    values: Tensor  # (C, *S, *B, D)
    weights: Tensor  # (C)
    log_prob: Tensor | None  # of the whole mixture, (C, *S, *B)


class ComponentSums(TorchDistribution):
    """What a mixture gives by draws from each of its components: sums without noise in them."""

    base: TorchDistribution
    components: tuple[Flow, ...]
    context: Tensor | None
    memory: float
    log_weights: Any
    weights: Any
    _active: Any

    def rsample_component(self, c: int, sample_shape: Any = ()) -> Tensor:
        """Draw from component c."""
        raise NotImplementedError

    def _source(self, sample_shape: Any) -> Tensor:
        """Draw from the base."""
        raise NotImplementedError

    def _mix(self, which: Sequence[int], scores: Sequence[Tensor]) -> Tensor:
        """Return the log of the weighted sum of component densities."""
        raise NotImplementedError

    def stratified(self, sample_shape: Any = (), *, score: bool = False) -> Strata:
        r"""Draw from every component, so that no expectation is noisy in the component.

        .. math:: E_q[h] = \sum_c w_c\, E_{g_c}[h]

        Values carry pathwise gradients and the weights their own, so
        `(s.weights.view(-1, ...) * h(s.values)).sum(0)` has the gradient of everything.

        Args:
            sample_shape: shape (*S) of the draws from each component.
            score: also give the log density of the mixture at all draws, for which the draws
                of each component are passed back through the others.

        Returns:
            Values, of components of weight 0 too; weights; log q of the values, or None.
        """
        count = len(self.components)
        z0 = self._source((count, *sample_shape))
        values, log_det = push_all(self.components, z0, self.context)
        if not score:
            return Strata(values, self.weights, None)
        own = score_base(self.base, z0) - log_det
        return Strata(values, self.weights, self._mix(self._active, self._crossed(values, own)))

    def _crossed(self, values: Tensor, own: Tensor) -> list[Tensor]:
        """Return log g_c at all draws, for each c of positive weight, (C, *S, *B).

        No component is inverted at its own draws: their densities are known, and an inverse that
        rounding has made infinite would spoil the gradient even of numbers that are thrown away.
        """
        active, count = self._active, len(own)
        if count == 1:
            return [own]
        others = [[j for j in range(count) if j != c] for c in active]
        flows = [self.components[c] for c in active]
        found = score_each(
            self.base, flows, values[torch.tensor(others)], self.context, self.memory
        )
        return [
            torch.cat([score[:c], own[c : c + 1], score[c:]])
            for c, score in zip(active, found, strict=True)
        ]

    def expectation(
        self, function: Callable[[Tensor], Tensor], num_samples: int
    ) -> tuple[Tensor, Tensor]:
        r"""Estimate :math:`E_q[h(z)]` by draws from every component of positive weight.

        Args:
            function: h, of points (S, *B, D), to values (S, *B) or (S, *B, ...).
            num_samples: S, the draws from each component, two or more.

        Returns:
            The estimate and its standard error.  # (*B, ...), (*B, ...)

        Raises:
            ValueError: if there are too few draws.
        """
        if num_samples < 2:
            raise ValueError(
                f"BoostedFlow.expectation: num_samples is {num_samples}; give two or more, so that "
                "the error can be told."
            )
        mean, variance = torch.zeros(()), torch.zeros(())
        for c in self._active:
            values = function(self.rsample_component(c, (num_samples,)))
            weight = self.log_weights[c].exp()
            mean = mean + weight * values.mean(0)
            variance = variance + weight.detach() ** 2 * values.detach().var(0) / num_samples
        return mean, variance.sqrt()
