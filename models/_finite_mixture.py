"""Mixtures of finitely many components whose posterior is exact: what all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel
from pyroboost.program import Program

__all__ = ["FiniteMixture", "Parts"]


class Parts(nn.Module):
    """The parameters of a mixture and the programs that read them; subclasses know the laws.

    Args:
        visible: name of the data's site.
        hidden: name of the component's site.
    """

    def __init__(self, visible: str, hidden: str) -> None:
        super().__init__()
        self.visible, self.hidden = visible, hidden

    def check(self, x: Tensor) -> None:
        """Refuse data that do not fit."""
        raise NotImplementedError

    def log_weights(self) -> Tensor:
        """Return log w_c of every component, (K,)."""
        raise NotImplementedError

    def joint(self, x: Tensor) -> Tensor:
        """Return log m(x, c) of every component, (..., K)."""
        raise NotImplementedError

    def model(self, x: Tensor) -> Tensor:
        """Draw a component, then x."""
        raise NotImplementedError

    def marginal(self, x: Tensor) -> Tensor:
        """Draw x without the component."""
        raise NotImplementedError

    def recognise(self, x: Tensor) -> Tensor:
        """Draw c ~ m(c | x), the exact posterior, with gradients."""
        return self._posterior(x, self.joint(x))

    def guide(self, x: Tensor) -> Tensor:
        """Draw c ~ m(c | x), without gradients: their mean is zero and their noise is not."""
        return self._posterior(x, self.joint(x).detach())

    def _posterior(self, x: Tensor, logits: Tensor) -> Tensor:
        with pyro.plate("data", x.shape[-2], dim=-1, device=x.device):
            return pyro.sample(self.hidden, dist.Categorical(logits=logits))


P = TypeVar("P", bound=Parts)


class FiniteMixture(MetaModel, Generic[P]):
    """A mixture whose component is the hidden site, and whose guide is its exact posterior.

    Args:
        parts: the parameters and programs.
        dim: size D of a datum.
    """

    def __init__(self, parts: P, dim: int) -> None:
        super().__init__(
            parts.model,
            parts.guide,
            visible=parts.visible,
            hidden=parts.hidden,
            visible_shape=(dim,),
            hidden_shape=(),
        )
        self._recognition = Program(parts.recognise, "guide")
        self._marginal = Program(parts.marginal, "marginal")

    @property
    def recognition(self) -> Program:
        """The guide with gradients, for where a stage above models the component."""
        return self._recognition

    @property
    def marginal(self) -> Callable[..., Any]:
        """The program of x alone, the component summed out."""
        return self._marginal

    @property
    def components(self) -> P:
        """The module that holds the parameters."""
        return cast(P, self.model.parts[0])

    def responsibilities(self, x: Tensor) -> Tensor:
        r"""Return $m(c \mid x)$.

        Args:
            x: data.  # (N, D)

        Returns:
            Probabilities.  # (N, K)
        """
        return self.components.joint(x).softmax(-1)

    def _summed_out(self, x: Tensor, rows: int) -> Likelihood:
        """Return exact log m(x), so many rows at once."""
        self.components.check(x)
        blocks = [self.components.joint(some).logsumexp(-1) for some in torch.split(x, rows)]
        return Likelihood(torch.cat(blocks), "exact")

    def log_prior(self, h: Tensor, *args: Any, template: Tensor | None = None) -> Likelihood:
        r"""Return $\log w_c$ of given components, exactly.

        Args:
            h: components.  # (N,)
            *args: not read.
            template: not read.

        Returns:
            Log probabilities in nats.  # (N,)
        """
        return Likelihood(self.components.log_weights().detach()[h.long()], "exact")

    def objective(self) -> Callable[..., Tensor]:
        """Return the loss with the component summed out, which is minus the exact likelihood."""
        return self._loss

    def _loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        x: Tensor,
        *args: object,
        weights: Tensor | None = None,
    ) -> Tensor:
        value = self.components.joint(x).logsumexp(-1)
        return -(value if weights is None else weights * value).sum()
