"""Mixtures of independent bits: an exact likelihood, an exact guide, and EM."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel
from pyroboost.models._bits_em import ROWS, BitsEMResult, check_fit, run_em
from pyroboost.models._finite_mixture import FiniteMixture, Parts
from pyroboost.models._products import multiply_bernoullis, repeats
from pyroboost.sampling.gibbs import is_binary

__all__ = ["BernoulliMixture", "BitsEMResult"]


class _Bits(dist.MixtureSameFamily):
    """A mixture of bits whose support is that of its components."""

    support = constraints.independent(constraints.boolean, 1)  # type: ignore[no-untyped-call]


class _Components(Parts):
    """Log weights and log odds, and the programs that read them."""

    def __init__(self, k: int, dim: int, visible: str, hidden: str) -> None:
        super().__init__(visible, hidden)
        self.weight_logits = nn.Parameter(torch.zeros(k))
        self.logits = nn.Parameter(torch.randn(k, dim))  # equal components would never part

    def check(self, x: Tensor) -> None:
        """Refuse data that are not rows of bits."""
        dim = self.logits.shape[1]
        if x.dim() < 2 or x.shape[-1] != dim:
            raise ValueError(
                f"BernoulliMixture: site '{self.visible}' got shape {tuple(x.shape)}; it takes "
                f"data of shape (N, {dim})."
            )
        if pyro.settings.get("validate_distributions_torch") and not is_binary(x):
            raise ValueError(
                f"BernoulliMixture: '{self.visible}' holds values other than 0 and 1 (or NaN); "
                "binarise the data first."
            )

    def log_weights(self) -> Tensor:
        """Return log w_c of every component, (K,)."""
        return self.weight_logits.log_softmax(-1)

    def joint(self, x: Tensor) -> Tensor:
        """Return log m(x, c) of every component, (..., K)."""
        self.check(x)
        x = x.to(self.logits)
        empty = softplus(self.logits, threshold=50.0).sum(-1)
        return self.log_weights() + x @ self.logits.mT - empty

    def model(self, x: Tensor) -> Tensor:
        """Draw a component, then bits."""
        self.check(x)
        with pyro.plate("data", x.shape[-2], dim=-1, device=x.device):
            c = pyro.sample(self.hidden, dist.Categorical(logits=self.weight_logits))
            law = dist.Bernoulli(logits=self.logits[c], validate_args=False).to_event(1)
            return pyro.sample(self.visible, law, obs=x.to(self.logits.dtype))

    def marginal(self, x: Tensor) -> Tensor:
        """Draw x without the component."""
        self.check(x)
        bits = dist.Bernoulli(logits=self.logits, validate_args=False).to_event(1)
        law = _Bits(dist.Categorical(logits=self.weight_logits), bits, validate_args=False)
        with pyro.plate("data", x.shape[-2], dim=-1, device=x.device):
            return pyro.sample(self.visible, law, obs=x.to(self.logits.dtype))


class BernoulliMixture(FiniteMixture[_Components]):
    r"""A mixture of vectors of independent bits whose component is the hidden site.

    $$m(x, c) = w_c \prod_d e^{x_d \ell_{cd}} / (1 + e^{\ell_{cd}}), \qquad
    q(c \mid x) = m(c \mid x)$$

    Likelihood and guide are exact. Fit it by :meth:`fit_em`, or by gradients of its exact
    likelihood, its own :meth:`objective`.

    Args:
        num_components: K.
        dim: size D of a datum.
        visible: name of the data's site.
        hidden: name of the component's site.

    Example:
        >>> mixture = BernoulliMixture(3, 4)
        >>> bits = (torch.rand(200, 4) < 0.5).float()
        >>> result = mixture.fit_em(bits, restarts=1)
        >>> result.history[-1] >= result.history[0]
        True
        >>> mixture.log_marginal(bits).kind
        'exact'

    Reference:
        Bishop, Pattern recognition and machine learning (2006), section 9.3.3.
    """

    def __init__(
        self, num_components: int, dim: int, *, visible: str = "x", hidden: str = "component"
    ) -> None:
        if num_components < 1 or dim < 1:
            raise ValueError(
                f"BernoulliMixture: got {num_components} components of {dim} bits; both must be "
                "at least 1."
            )
        super().__init__(_Components(num_components, dim, visible, hidden), dim)

    @property
    def log_weights(self) -> Tensor:
        """Log weights of the components, detached, (K,)."""
        return self.components.log_weights().detach()

    @property
    def logits(self) -> Tensor:
        """Log odds of the bits of each component, detached, (K, D)."""
        return self.components.logits.detach()

    @torch.no_grad()
    def assign(self, log_weights: Tensor, logits: Tensor) -> None:
        """Set the parameters.

        Args:
            log_weights: log weights up to a constant.  # (K,)
            logits: log odds.  # (K, D)

        Raises:
            ValueError: shapes that do not fit, or numbers that are not finite.
        """
        parts = self.components
        if log_weights.shape != parts.weight_logits.shape or logits.shape != parts.logits.shape:
            raise ValueError(
                f"BernoulliMixture.assign: got shapes {tuple(log_weights.shape)} and "
                f"{tuple(logits.shape)}; this mixture has {tuple(parts.weight_logits.shape)} and "
                f"{tuple(parts.logits.shape)}."
            )
        if not bool(log_weights.isfinite().all() & logits.isfinite().all()):
            raise ValueError("BernoulliMixture.assign: log weights and log odds must be finite.")
        parts.weight_logits.copy_(log_weights)
        parts.logits.copy_(logits)

    def log_marginal(self, x: Tensor, *args: Any) -> Likelihood:
        r"""Return the exact $\log m(x)$ in nats.

        Args:
            x: bits.  # (N, D)
            *args: not read.

        Returns:
            Exact log probabilities, with gradients where they are enabled.  # (N,)
        """
        return self._summed_out(x, ROWS)

    def multiplied(
        self, parts: Sequence[MetaModel], powers: Sequence[float]
    ) -> tuple[BernoulliMixture, float] | None:
        """Return the product of mixtures of bits as one, with the log Z of the product.

        Args:
            parts: the factors, this one first.
            powers: their powers.

        Returns:
            ``None`` where the powers, the number of components or another class forbid it.
        """
        mixtures = [part for part in parts if isinstance(part, BernoulliMixture)]
        copies = repeats([len(part.logits) for part in mixtures], powers[: len(mixtures)])
        if len(mixtures) < len(parts) or copies is None:
            return None
        log_weights, logits, log_z = multiply_bernoullis(
            [(part.log_weights, part.logits) for part in mixtures], copies
        )
        found = BernoulliMixture(*logits.shape, visible=self.visible, hidden=self.hidden)
        found.to(self.logits)
        found.assign(log_weights.to(self.logits), logits.to(self.logits))
        return found, log_z

    @property
    def own_fit(self) -> Callable[..., BitsEMResult]:
        """Fit by EM, as boosting does where nothing else is asked for."""
        return self.fit_em

    @torch.no_grad()
    def fit_em(
        self,
        data: Tensor,
        *,
        validation: Tensor | None = None,
        weights: Tensor | None = None,
        pseudo_count: float = 0.5,
        restarts: int = 2,
        max_iterations: int = 200,
        tolerance: float = 1e-4,
        generator: torch.Generator | None = None,
    ) -> BitsEMResult:
        r"""Fit by EM to the mode under a Beta prior on each probability: the best of several runs.

        $$\ell_{cd} = \log \frac{\sum_n v_n r_{nc} x_{nd} + a}{\sum_n v_n r_{nc} (1 - x_{nd}) + a},
        \qquad w_c \propto \sum_n v_n r_{nc} + a$$

        With $a > 0$ no probability is ever 0 or 1, so that all log odds stay finite and no
        likelihood is clipped.

        Args:
            data: bits.  # (N, D)
            validation: held-out bits.  # (M, D)
            weights: weights v of the data, at least 0; their mean is brought to 1.  # (N,)
            pseudo_count: a, counted on either side of every bit of every component.
            restarts: independent starts.
            max_iterations: steps at most, per restart.
            tolerance: least gain of a step in nats per datum; 0 makes every step.
            generator: source of randomness; ``None`` is torch's global one.

        Returns:
            The history and the held-out log-likelihood.

        Raises:
            ValueError: data or options are of no use.
        """
        begin = time.perf_counter()
        weights = check_fit(
            data, self.components.check, weights, pseudo_count, restarts, max_iterations, tolerance
        )
        k = len(self.logits)
        fits = [
            run_em(data, k, weights, pseudo_count, max_iterations, tolerance, generator)
            for _ in range(restarts)
        ]
        log_weights, logits, history, converged = max(fits, key=lambda found: found[2][-1])
        self.assign(log_weights.to(self.logits), logits.to(self.logits))
        held_out = None if validation is None else self.log_marginal(validation).mean
        ends = [found[2][-1] for found in fits]
        return BitsEMResult(history, converged, ends, held_out, time.perf_counter() - begin)
