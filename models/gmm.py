"""Gaussian mixtures: an exact likelihood, an exact guide, and EM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor

from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel
from pyroboost.models._components import Components
from pyroboost.models._em import Covariance, Mixture, chunk_rows
from pyroboost.models._em_checks import check_options, check_rows
from pyroboost.models._em_restarts import EMResult, Start, best_of
from pyroboost.models._finite_mixture import FiniteMixture
from pyroboost.models._products import log_normal_at, multiply_gaussians, repeats
from pyroboost.models.bernoulli_mixture import BernoulliMixture

__all__ = ["GMM", "EMResult"]


def enumerated_loss(model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> Tensor:
    """Return minus the bound, in nats, with the guide's discrete site summed out."""
    every = config_enumerate(guide, "parallel")
    loss: Tensor = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, every, *args)
    return loss


class GMM(FiniteMixture[Components]):
    r"""A Gaussian mixture whose component is the hidden site.

    $$m(x, c) = w_c \, N(x; \mu_c, \Sigma_c), \qquad q(c \mid x) = m(c \mid x)
    = \frac{w_c N(x; \mu_c, \Sigma_c)}{\sum_k w_k N(x; \mu_k, \Sigma_k)}$$

    The guide is the exact posterior, so that every importance weight is $m(x)$, and the gradient
    of ``Trace_ELBO`` is that of the exact likelihood in expectation. It is so without noise in
    ``TraceEnum_ELBO`` with ``config_enumerate(gmm.guide, "parallel")``, which is the mixture's
    own :meth:`objective`. Fit it by :meth:`fit_em`, or by SVI: its parameters are unconstrained.

    Args:
        num_components: K.
        dim: size D of a datum.
        covariance: ``"full"`` or ``"diag"``.
        visible: name of the data's site.
        hidden: name of the component's site.

    Example:
        >>> gmm = GMM(3, 2)
        >>> result = gmm.fit_em(torch.randn(500, 2), restarts=2)
        >>> result.history[-1] >= result.history[0]
        True
        >>> gmm.log_marginal(torch.randn(4, 2)).value.shape
        torch.Size([4])

    Reference:
        Dempster, Laird and Rubin (1977), "Maximum likelihood from incomplete data", section 4.3.
    """

    def __init__(
        self,
        num_components: int,
        dim: int,
        *,
        covariance: Covariance = "full",
        visible: str = "x",
        hidden: str = "component",
    ) -> None:
        if num_components < 1 or dim < 1:
            raise ValueError(
                f"GMM: got {num_components} components of dimension {dim}; both must be at least 1."
            )
        if covariance not in ("full", "diag"):
            raise ValueError(f'GMM: covariance is {covariance!r}; pass "full" or "diag".')
        super().__init__(Components(num_components, dim, covariance, visible, hidden), dim)
        self.covariance: Covariance = covariance

    @property
    def mixture(self) -> Mixture:
        """Weights (K,), locations (K, D) and scales, detached; assigning them sets the state."""
        parts = self.components
        found = (parts.logits.softmax(-1), parts.locs, parts.scale())
        return Mixture(*(part.detach().clone() for part in found))

    @mixture.setter
    def mixture(self, value: Mixture) -> None:
        self.components.assign(value)

    def log_marginal(self, x: Tensor, *args: Any) -> Likelihood:
        r"""Return the exact $\log m(x) = \log \sum_k w_k N(x; \mu_k, \Sigma_k)$ in nats.

        Args:
            x: data.  # (N, D)
            *args: not read.

        Returns:
            Exact log densities, with gradients where they are enabled.  # (N,)
        """
        return self._summed_out(x, chunk_rows(x, len(self.components.locs)))

    def multiplied(
        self, parts: Sequence[MetaModel], powers: Sequence[float]
    ) -> tuple[GMM, float] | None:
        """Return the product of mixtures of Gaussians as one, with the log Z of the product.

        Args:
            parts: the factors, this one first.
            powers: their powers.

        Returns:
            ``None`` where the powers, the number of components or another class forbid it.
        """
        mixtures = [part.mixture for part in parts if isinstance(part, GMM)]
        copies = repeats([len(m.weights) for m in mixtures], powers[: len(mixtures)])
        if len(mixtures) < len(parts) or copies is None:
            return None
        product = multiply_gaussians(mixtures, copies)
        kind: Covariance = "full" if product.mixture.is_full else "diag"
        shape, like = product.mixture.locs.shape, self.components.locs
        found = GMM(*shape, covariance=kind, visible=self.visible, hidden=self.hidden).to(like)
        found.mixture = product.mixture.to(like)
        with torch.no_grad():  # however small: far out a tiny weight may be all there is
            found.components.logits.copy_(product.log_weights)
        return found, product.log_partition

    def on_bits(self) -> BernoulliMixture:
        r"""Return this diagonal mixture renormalised over the corners of the unit cube.

        $$m'(x) = \frac{m(x)}{\sum_{y \in \{0, 1\}^D} m(y)}, \qquad
        \ell_{cd} = \frac{2 \mu_{cd} - 1}{2 \sigma_{cd}^2}, \qquad
        w'_c \propto w_c \prod_d (N(0; \mu_{cd}, \sigma_{cd}^2) + N(1; \mu_{cd},
        \sigma_{cd}^2))$$

        It is exactly a mixture of independent bits, and so a density that a product with models
        of bits can have.

        Raises:
            ValueError: covariances are full, under which the bits of a component are coupled.
        """
        if self.covariance != "diag":
            raise ValueError(
                "GMM.on_bits: with full covariances the bits of a component are coupled and its "
                f"sum over 2^{self.components.locs.shape[1]} corners has no closed form; use "
                'covariance="diag".'
            )
        _, locs, scale = self.mixture.to(self.components.locs.double())
        zero, one = (log_normal_at(value, locs, scale) for value in (0.0, 1.0))
        masses = self.components.logits.detach().double() + torch.logaddexp(zero, one).sum(-1)
        found = BernoulliMixture(*locs.shape, visible=self.visible, hidden=self.hidden)
        found.to(self.components.locs)
        found.assign(masses.log_softmax(-1), one - zero)
        return found

    def _loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        x: Tensor,
        *args: object,
        weights: Tensor | None = None,
    ) -> Tensor:
        if weights is None:
            return enumerated_loss(model, guide, x, *args)
        return super()._loss(model, guide, x, *args, weights=weights.to(x))

    @property
    def own_fit(self) -> Callable[..., EMResult]:
        """Fit by EM, as greedy boosting does where nothing else is asked for."""
        return self.fit_em

    def fit_em(
        self,
        data: Tensor,
        *,
        validation: Tensor | None = None,
        start: Start = "prior",
        start_weight: float = 0.01,
        restarts: int | None = None,
        max_iterations: int = 200,
        tolerance: float = 1e-4,
        variance_floor: float = 1e-6,
        generator: torch.Generator | None = None,
    ) -> EMResult:
        r"""Fit by EM: the best of several runs, or their start if it generalises better.

        ``start="prior"`` is one $N(0, I)$ of weight $1 - e$ and k-means++ components of weight
        $e$ together: on any data $\log m(x) \ge \log(1 - e) + \log N(x; 0, I)$ before the first
        step, and no step lowers the likelihood of the training data. So a mixture on top of a
        model with a standard normal prior cannot lower its bound; on held-out data it can, and
        then the start is kept.

        Args:
            data: training data, float32 or float64; EM needs all at once.  # (N, D)
            validation: held-out data.  # (M, D)
            start: ``"prior"``; ``"kmeans"``: k-means++ alone; ``"current"``: the present state.
            start_weight: $e$.
            restarts: independent starts (4; 1 where the start is the present state).
            max_iterations: steps at most, per restart.
            tolerance: least gain of a step in nats per datum; 0 makes every step.
            variance_floor: least variance in any direction, in units of the columns' variances.
            generator: source of randomness; ``None`` is torch's global one.

        Returns:
            The history and what was decided.

        Raises:
            TypeError: the data are not one tensor of floats.
            ValueError: an option is out of its range, or the data are too few or not finite.
        """
        check_rows(data, validation, self.components.check, len(self.components.locs))
        check_options(
            "GMM.fit_em",
            start=start,
            start_weight=start_weight,
            restarts=restarts,
            max_iterations=max_iterations,
            tolerance=tolerance,
            variance_floor=variance_floor,
        )
        self.mixture, result = best_of(
            data,
            validation,
            self.mixture,
            self.covariance,
            start=start,
            start_weight=start_weight,
            restarts=restarts or (1 if start == "current" else 4),
            max_iterations=max_iterations,
            tolerance=tolerance,
            variance_floor=variance_floor,
            generator=generator,
        )
        return result
