"""Mixtures of independent bits: an exact likelihood, an exact guide, and EM."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel
from pyroboost.models._products import multiply_bernoullis, repeats
from pyroboost.program import Program
from pyroboost.sampling.gibbs import is_binary

__all__ = ["BernoulliMixture", "BitsEMResult"]

_ROWS = 8192


@dataclass(frozen=True)
class BitsEMResult:
    """What a fit by EM did; numbers are means per datum, in nats.

    Args:
        history: training log-likelihood plus log prior before each step and after the last, of
            the best restart: it never falls.
        converged: whether the last step gained less than the tolerance.
        restarts: final value of each restart.
        held_out: mean held-out log-likelihood; ``None`` without held-out data.
        seconds: wall-clock time.
    """

    history: list[float]
    converged: bool
    restarts: list[float]
    held_out: float | None
    seconds: float


class _Bits(dist.MixtureSameFamily):
    """A mixture of bits whose support is that of its components."""

    support = constraints.independent(constraints.boolean, 1)  # type: ignore[no-untyped-call]


class _Components(nn.Module):
    """Log weights and log odds, and the programs that read them."""

    def __init__(self, k: int, dim: int, visible: str, hidden: str) -> None:
        super().__init__()
        self.visible, self.hidden = visible, hidden
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

    def joint(self, x: Tensor) -> Tensor:
        """Return log m(x, c) of every component, (..., K)."""
        self.check(x)
        x = x.to(self.logits)
        empty = softplus(self.logits, threshold=50.0).sum(-1)
        return self.weight_logits.log_softmax(-1) + x @ self.logits.mT - empty

    def model(self, x: Tensor) -> Tensor:
        """Draw a component, then bits."""
        self.check(x)
        with pyro.plate("data", x.shape[-2], dim=-1, device=x.device):
            c = pyro.sample(self.hidden, dist.Categorical(logits=self.weight_logits))
            law = dist.Bernoulli(logits=self.logits[c], validate_args=False).to_event(1)
            return pyro.sample(self.visible, law, obs=x.to(self.logits.dtype))

    def guide(self, x: Tensor) -> Tensor:
        """Draw c ~ m(c | x), without gradients: their mean is zero and their noise is not."""
        return self._posterior(x, self.joint(x).detach())

    def recognise(self, x: Tensor) -> Tensor:
        """Draw c ~ m(c | x), the exact posterior, with gradients."""
        return self._posterior(x, self.joint(x))

    def _posterior(self, x: Tensor, logits: Tensor) -> Tensor:
        with pyro.plate("data", x.shape[-2], dim=-1, device=x.device):
            return pyro.sample(self.hidden, dist.Categorical(logits=logits))

    def marginal(self, x: Tensor) -> Tensor:
        """Draw x without the component."""
        self.check(x)
        bits = dist.Bernoulli(logits=self.logits, validate_args=False).to_event(1)
        law = _Bits(dist.Categorical(logits=self.weight_logits), bits, validate_args=False)
        with pyro.plate("data", x.shape[-2], dim=-1, device=x.device):
            return pyro.sample(self.visible, law, obs=x.to(self.logits.dtype))

    def loss(
        self, model: object, guide: object, x: Tensor, *args: object, weights: Tensor | None = None
    ) -> Tensor:
        """Return minus the exact log-likelihood, summed over the batch."""
        value = self.joint(x).logsumexp(-1)
        return -(value if weights is None else weights * value).sum()


class BernoulliMixture(MetaModel):
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
        parts = _Components(num_components, dim, visible, hidden)
        super().__init__(
            parts.model,
            parts.guide,
            visible=visible,
            hidden=hidden,
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
    def components(self) -> _Components:
        """The module that holds the parameters."""
        parts: _Components = self.model.parts[0]  # type: ignore[assignment]
        return parts

    @property
    def log_weights(self) -> Tensor:
        """Log weights of the components, detached, (K,)."""
        return self.components.weight_logits.detach().log_softmax(-1)

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

    def responsibilities(self, x: Tensor) -> Tensor:
        r"""Return $m(c \mid x)$.

        Args:
            x: bits.  # (N, D)

        Returns:
            Probabilities.  # (N, K)
        """
        return self.components.joint(x).softmax(-1)

    def log_marginal(self, x: Tensor, *args: Any) -> Likelihood:
        r"""Return the exact $\log m(x)$ in nats.

        Args:
            x: bits.  # (N, D)
            *args: not read.

        Returns:
            Exact log probabilities, with gradients where they are enabled.  # (N,)
        """
        self.components.check(x)
        blocks = [self.components.joint(rows).logsumexp(-1) for rows in torch.split(x, _ROWS)]
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
        return Likelihood(self.log_weights[h.long()], "exact")

    def objective(self) -> Callable[..., Tensor]:
        """Return the loss with the component summed out, which is minus the exact likelihood."""
        return self.components.loss

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
        weights = self._check_fit(data, weights, pseudo_count, restarts, max_iterations, tolerance)
        fits = [
            self._em(data, weights, pseudo_count, max_iterations, tolerance, generator)
            for _ in range(restarts)
        ]
        log_weights, logits, history, converged = max(fits, key=lambda found: found[2][-1])
        self.assign(log_weights.to(self.logits), logits.to(self.logits))
        held_out = None if validation is None else self.log_marginal(validation).mean
        ends = [found[2][-1] for found in fits]
        return BitsEMResult(history, converged, ends, held_out, time.perf_counter() - begin)

    def _check_fit(
        self,
        data: Tensor,
        weights: Tensor | None,
        pseudo_count: float,
        restarts: int,
        max_iterations: int,
        tolerance: float,
    ) -> Tensor:
        if not isinstance(data, Tensor):
            raise TypeError(
                f"BernoulliMixture.fit_em: got {type(data).__name__}; EM needs all data at once, "
                "as one tensor (N, D)."
            )
        self.components.check(data)
        if not is_binary(data):
            raise ValueError(
                "BernoulliMixture.fit_em: the data hold values other than 0 and 1 (or NaN); "
                "binarise them first."
            )
        if not 0.0 < pseudo_count < math.inf or restarts < 1 or max_iterations < 0:
            raise ValueError(
                f"BernoulliMixture.fit_em: got pseudo_count={pseudo_count}, restarts={restarts} "
                f"and max_iterations={max_iterations}; take a positive count, at least one "
                "restart and no negative number of steps."
            )
        if not tolerance >= 0.0:
            raise ValueError(f"BernoulliMixture.fit_em: tolerance is {tolerance}; take 0 or more.")
        if weights is None:
            return torch.ones(len(data), dtype=torch.float64, device=data.device)
        found = weights.double()
        good = found.shape == (len(data),) and bool((found.isfinite() & (found >= 0)).all())
        if not good or float(found.sum()) <= 0:
            raise ValueError(
                f"BernoulliMixture.fit_em: weights of shape {tuple(weights.shape)} came for "
                f"{len(data)} data; give one finite number of at least 0 each, not all 0."
            )
        return found / found.mean()

    def _em(
        self,
        data: Tensor,
        weights: Tensor,
        a: float,
        steps: int,
        tolerance: float,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, list[float], bool]:
        """One run from random responsibilities, in float64 where it sums over data."""
        k = len(self.logits)
        noise = torch.empty(len(data), k, dtype=torch.float64, device=data.device)
        resp = noise.exponential_(generator=generator)
        log_weights, logits = _maximise(data, resp / resp.sum(-1, keepdim=True), weights, a)
        history: list[float] = []
        converged = False
        for step in range(steps + 1):
            resp, mean = _expect(data, weights, log_weights, logits)
            history.append(mean + _log_prior(log_weights, logits, a) / float(weights.sum()))
            if step and history[-1] - history[-2] < tolerance and tolerance > 0:
                converged = True
                break
            if step < steps:
                log_weights, logits = _maximise(data, resp, weights, a)
        return log_weights, logits, history, converged


def _maximise(data: Tensor, resp: Tensor, weights: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """Return log weights and log odds of the mode, given responsibilities."""
    mass = resp * weights[:, None]
    counts = mass.sum(0)
    ones = torch.zeros(resp.shape[1], data.shape[1], dtype=torch.float64, device=data.device)
    for rows, part in zip(torch.split(data, _ROWS), torch.split(mass, _ROWS), strict=True):
        ones += part.mT @ rows.double()
    zeros = (counts[:, None] - ones).clamp_min(0.0)
    return (counts + a).log() - (counts + a).sum().log(), (ones + a).log() - (zeros + a).log()


def _expect(
    data: Tensor, weights: Tensor, log_weights: Tensor, logits: Tensor
) -> tuple[Tensor, float]:
    """Return responsibilities and the mean log-likelihood."""
    offset = log_weights - softplus(logits, threshold=50.0).sum(-1)
    joint = torch.cat([rows.double() @ logits.mT + offset for rows in torch.split(data, _ROWS)])
    value = joint.logsumexp(-1)
    return (joint - value[:, None]).exp(), float((weights * value).sum() / weights.sum())


def _log_prior(log_weights: Tensor, logits: Tensor, a: float) -> float:
    """Return the log prior up to a constant: a pseudo-count of a on either side of every bit."""
    bits = -softplus(-logits, threshold=50.0) - softplus(logits, threshold=50.0)
    return a * float(bits.sum() + log_weights.sum())
