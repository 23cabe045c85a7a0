"""What a fit minimises and what it judges by: losses, KL annealing, the held-out bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroboost.handlers import is_plate
from pyroboost.metamodel import MetaModel

__all__ = ["Annealing", "bound_estimator", "resolve_loss", "scale_latents"]

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
        loss = pair.objective() or Trace_ELBO(max_plate_nesting=1)
    if hasattr(loss, "differentiable_loss"):
        return loss.differentiable_loss
    if hasattr(loss, "loss_and_grads") or not callable(loss):
        raise TypeError(
            f"fit: the loss {type(loss).__name__} has no differentiable_loss; pass a Pyro ELBO "
            "that has one, or a function (model, guide, *batch) -> scalar."
        )
    return loss


def bound_estimator(loss: Any, num_particles: int) -> Any:
    """Return the ELBO that judges a fit on held-out data.

    Always the plain bound, so that fits with different training losses compare; a loss that sums
    enumerated sites out is kept, since without it the model's enumerated sites have no guide.
    """
    if num_particles < 1:
        raise ValueError(f"fit: num_validation_particles is {num_particles}; take 1 or more.")
    nesting = getattr(loss, "max_plate_nesting", 1)
    nesting = 1 if nesting is None or math.isinf(nesting) else nesting
    kind = TraceEnum_ELBO if isinstance(loss, TraceEnum_ELBO) else Trace_ELBO
    return kind(num_particles=num_particles, max_plate_nesting=nesting)
