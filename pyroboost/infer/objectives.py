"""What a fit minimises and what it judges by: losses, KL annealing, the held-out bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroboost.distributions import Components
from pyroboost.handlers import is_plate
from pyroboost.infer.importance_weighted import ImportanceWeightedELBO
from pyroboost.infer.stratified import StratifiedELBO
from pyroboost.metamodel import MetaModel

__all__ = ["Annealing", "TemperedELBO", "bound_estimator", "resolve_loss", "scale_latents"]

Loss = Callable[..., Tensor]


class scale_latents(Messenger):
    r"""Scale the log density of every latent site by $\beta$; observed sites stay as they are.

    Around the model and around the guide, prior and entropy terms are scaled together and the
    bound becomes $E_q[\log m(x \mid h)] - \beta\, KL(q(h \mid x) \,\|\, m(h))$ in nats.

    Args:
        beta: the positive factor; it may be set anew between runs.
        everything: scale observed sites too; for a guide, whose ``factor`` sites belong to log q.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
        >>> nodes = pyro.poutine.trace(scale_latents(0.5)(model)).get_trace().nodes
        >>> nodes["z"]["scale"], nodes["x"]["scale"]
        (0.5, 1.0)

    Reference:
        Sønderby et al., Ladder variational autoencoders (2016), section 2.3: warm-up.
    """

    def __init__(self, beta: float = 1.0, *, everything: bool = False) -> None:
        super().__init__()
        self.beta, self.everything = beta, everything
        self.reached = False

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate(msg) or (msg["is_observed"] and not self.everything):
            return
        self.reached = True
        msg["scale"] = self.beta * msg["scale"]


class Annealing:
    """The weight beta of the latent terms over the epochs, and the programs that it scales.

    Args:
        pair: the meta-model.
        schedule: epochs of a linear warm-up from 0 to 1, or a function from the epochs done,
            a fraction that counts the running batch, to beta > 0; ``None``: beta is 1.
    """

    def __init__(
        self, pair: MetaModel, schedule: float | Callable[[float], float] | None = None
    ) -> None:
        if isinstance(schedule, int | float) and not 0 <= schedule < math.inf:
            raise ValueError(f"fit: annealing={schedule}; take a number of epochs of 0 or more.")
        self.pair, self.schedule = pair, schedule
        self._latents, self._all = scale_latents(), scale_latents(everything=True)
        self._model, self._guide = self._latents(pair.model), self._all(pair.guide)

    def beta(self, progress: float) -> float:
        """Return beta after ``progress`` epochs, and remember it for :meth:`programs`."""
        if not self.schedule:
            return 1.0
        if callable(self.schedule):
            beta = float(self.schedule(progress))
        else:
            beta = min(1.0, progress / self.schedule)
        if not 0.0 < beta < math.inf:
            raise ValueError(
                f"fit: annealing gives beta = {beta} after {progress:.3g} epochs; return a finite "
                "positive number."
            )
        self._latents.beta = self._all.beta = beta
        return beta

    def programs(self, beta: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return model and guide, scaled unless beta is 1."""
        return (self.pair.model, self.pair.guide) if beta == 1.0 else (self._model, self._guide)

    def check(self) -> None:
        """Refuse a loss that runs neither program, since annealing would do nothing to it."""
        if not (self._latents.reached or self._all.reached):
            raise ValueError(
                "fit: annealing scales the latent sites of the model and guide that the loss is "
                "given, and this loss reached none; leave annealing out or take another loss."
            )


def resolve_loss(pair: MetaModel, loss: Any) -> Loss:
    """Return the loss as ``loss(model, guide, *batch) -> scalar``, summed over the batch in nats.

    Args:
        pair: the meta-model, asked for its own objective where ``loss`` is ``None``.
        loss: something with ``differentiable_loss``, or a callable.
    """
    if loss is None:
        loss = pair.objective() or _default(pair)
    if hasattr(loss, "differentiable_loss"):
        return loss.differentiable_loss
    if hasattr(loss, "loss_and_grads") or not callable(loss):
        raise TypeError(
            f"fit: the loss {type(loss).__name__} has no differentiable_loss; pass a Pyro ELBO "
            "that has one, or a function (model, guide, *batch) -> scalar."
        )
    return loss


def _default(pair: MetaModel) -> Any:
    """Return the loss of a pair that names none; a boosted mixture's has pathwise gradients."""
    mixtures = list({id(m): m for m in pair.guide.modules() if isinstance(m, Components)}.values())
    if len(mixtures) == 1 and len(mixtures[0].active) > 1:
        return StratifiedELBO(max_plate_nesting=1)
    return Trace_ELBO(max_plate_nesting=1)


def bound_estimator(pair: MetaModel, loss: Any, num_particles: int) -> Any:
    """Return the bound that judges a fit on held-out data.

    It is the plain bound, so that fits with different training losses compare, unless the loss or
    the pair has an importance-weighted one of its own: then that, with its K, averaged over
    draws. A loss that sums enumerated sites out is kept, since without it the model's enumerated
    sites have no guide. A loss with a method ``judge`` brings the estimator of its own.

    Args:
        pair: the meta-model.
        loss: the training loss, or ``None`` for the pair's own.
        num_particles: draws of the bound per datum.
    """
    if num_particles < 1:
        raise ValueError(f"fit: num_validation_particles is {num_particles}; take 1 or more.")
    nesting = getattr(loss, "max_plate_nesting", 1)
    nesting = 1 if nesting is None or math.isinf(nesting) else nesting
    own = getattr(loss, "__self__", loss)
    if hasattr(own, "judge"):
        return own.judge(num_particles)
    if isinstance(own, ImportanceWeightedELBO):
        return _Averaged(own, num_particles)
    if isinstance(loss, TraceEnum_ELBO):
        return TraceEnum_ELBO(num_particles=num_particles, max_plate_nesting=nesting)
    if pair.num_particles > 1:
        bound = ImportanceWeightedELBO(pair.num_particles, max_plate_nesting=nesting)
        return _Averaged(bound, num_particles)
    return Trace_ELBO(num_particles=num_particles, max_plate_nesting=nesting)


class _Averaged:
    """The mean of several draws of a bound."""

    def __init__(self, elbo: ImportanceWeightedELBO, draws: int) -> None:
        self.elbo, self.draws = elbo, draws

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return minus the mean, summed over data."""
        drawn = (self.elbo.loss(model, guide, *args, **kwargs) for _ in range(self.draws))
        return sum(drawn) / self.draws


class TemperedELBO(Trace_ELBO):
    r"""The bound of any Pyro pair with its latent terms scaled: KL annealing as a loss.

    $$\mathcal{L}_\beta = E_q [\log m(x \mid h) + \beta\, (\log m(h) - \log q(h \mid x))]$$

    For ``SVI`` and other loops of one's own; ``fit(annealing=...)`` does the same, knows how many
    epochs are done, and resumes.

    Args:
        beta: a positive number, or a function from the steps done to one.
        **settings: settings of ``Trace_ELBO``.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro.optim import Adam
        >>> from pyroboost.models import VAE
        >>> import torch
        >>> vae, loss = VAE(6, 2, units=8), TemperedELBO(lambda step: min(1.0, 0.01 * (step + 1)))
        >>> svi = SVI(vae.model, vae.guide, Adam({"lr": 0.01}), loss)
        >>> _ = svi.step(torch.zeros(4, 6)), svi.step(torch.zeros(4, 6))
        >>> loss.steps, loss.value
        (2, 0.02)

    Reference:
        Sønderby et al., Ladder variational autoencoders (2016), section 2.3: warm-up.
    """

    def __init__(self, beta: float | Callable[[int], float], **settings: Any) -> None:
        super().__init__(**settings)
        self.beta, self.steps = beta, 0
        self._check(self.value if not callable(beta) else 1.0)

    @property
    def value(self) -> float:
        """The beta of the last step, or of the first one before it."""
        return float(self.beta(max(0, self.steps - 1)) if callable(self.beta) else self.beta)

    @staticmethod
    def _check(beta: float) -> float:
        if not 0.0 < beta < math.inf:
            raise ValueError(f"TemperedELBO: beta is {beta}; take a finite positive number.")
        return beta

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        beta = self._check(self.value)
        tempered = scale_latents(beta)(model), scale_latents(beta, everything=True)(guide)
        return super()._get_traces(*tempered, args, kwargs)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return one draw of minus the scaled bound, and count a step."""
        self.steps += 1
        return super().differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return the same as a number after adding its gradient, and count a step."""
        self.steps += 1
        return super().loss_and_grads(model, guide, *args, **kwargs)
