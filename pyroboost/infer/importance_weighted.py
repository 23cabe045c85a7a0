"""The importance-weighted bound of any pair as a loss, with three estimators of its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_site_shape
from torch import Tensor

from pyroboost.infer._draws import Gradient, Leaf, cut, same_rows
from pyroboost.infer._particles import Layout, random_sites

__all__ = ["Gradient", "ImportanceWeightedELBO"]

_GRADIENTS = get_args(Gradient)
_DOUBLY = _GRADIENTS[2]


class _Run(NamedTuple):
    """One run of guide and model: all particles, or one of them."""

    log_model: Tensor
    log_guide: Tensor
    score: Tensor | None
    scale: Tensor | float
    beta: float
    leaves: list[Leaf]


class ImportanceWeightedELBO(ELBO):
    r"""The importance-weighted bound over any Pyro pair, one logarithm of a mean per datum.

    $$\mathcal{L}_K = \sum_n s_n\, \mathbb{E} \log \frac1K \sum_{k=1}^K
    \frac{m(h_{nk})^\beta\, m(x_n \mid h_{nk})}{q(h_{nk} \mid x_n)^\beta},
    \qquad h_{nk} \sim q(h \mid x_n)$$

    A datum is what lies in the plates that hold every site; its weight has no scale in it. The
    scale $s_n$ of the observed sites (a subsample's, or a weight per datum) stands outside of the
    logarithm, so that the bound of a minibatch is unbiased for that of all data. What a latent
    site is scaled by beyond $s_n$ is the annealing exponent $\beta$ of :class:`scale_latents`.

    With $\tilde w_k = w_k / \sum_j w_j$, parameters of the model follow
    $\sum_k \tilde w_k \nabla_\theta \log m(x, h_k)$ under every estimator, and those of the guide:

    - ``"standard"``: $\sum_k \tilde w_k \nabla_\phi \log w_k$ through the draws and through
      $\log q$; a draw that is not reparameterised adds its score times the bound of its datum.
      Unbiased for every K. As K grows its signal vanishes faster than its noise.
    - ``"sticking-the-landing"``: the same through the draws alone. No noise is left where q is
      the posterior. Unbiased for K = 1; for more particles what it leaves out has a mean that is
      not zero.
    - ``"doubly-reparameterised"``: $\sum_k ((1 - \beta) \tilde w_k + \beta \tilde w_k^2)\,
      \partial_h \log w_k\, \partial_\phi h_k$. Unbiased for every K and $\beta$; for K = 1 it is
      the one before.

    The last two take guides whose draws are all reparameterised, among them hierarchical ones and
    those that share parameters with the model: a parameter gets the sum of what each role gives.

    Args:
        num_particles: importance samples K.
        gradient: the estimator for the parameters of the guide.
        max_plate_nesting: number of nested plates, counted from the right.
        vectorize_particles: whether the particles are one more dimension on the left; else the
            pair runs K times.

    Raises:
        ValueError: a subsampled plate does not hold every site, sites are scaled in ways that are
            neither weight nor annealing, or the guide does not fit model or estimator.

    Example:
        >>> from pyroboost.models import VAE
        >>> vae, loss = VAE(6, 2, units=8), ImportanceWeightedELBO(5)
        >>> loss.differentiable_loss(vae.model, vae.guide, torch.zeros(4, 6)).backward()
        >>> all(p.grad is not None for p in vae.parameters())
        True

    Reference:
        Burda et al., Importance weighted autoencoders (2016), Eq. 8 and 14; Roeder et al.,
        Sticking the landing (2017); Tucker et al., Doubly reparameterized gradient estimators
        (2019), Eq. 8, and Bauer and Mnih (2021) for hierarchical guides; Undirected posteriors,
        Eq. 20 and appendix C: annealing.
    """

    def __init__(
        self,
        num_particles: int = 5,
        *,
        gradient: Gradient = "standard",
        max_plate_nesting: float = 1,
        vectorize_particles: bool = True,
    ) -> None:
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(
                f"ImportanceWeightedELBO: num_particles is {num_particles}; take a whole number "
                "of 1 or more."
            )
        if gradient not in _GRADIENTS:
            raise ValueError(
                f"ImportanceWeightedELBO: gradient is {gradient!r}; take one of "
                f"{', '.join(map(repr, _GRADIENTS))}."
            )
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        self.gradient = gradient

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> _Run:
        draws = cut(self.gradient, self.num_particles)
        if self.gradient == "standard" or not torch.is_grad_enabled():
            inner = poutine.trace(guide).get_trace(*args, **kwargs)
        else:
            with draws:
                inner = poutine.trace(guide).get_trace(*args, **kwargs)
        outer = poutine.trace(poutine.replay(model, trace=inner)).get_trace(*args, **kwargs)
        guide_trace, model_trace = prune_subsample_sites(inner), prune_subsample_sites(outer)
        inferred, scored = random_sites(guide_trace), random_sites(model_trace)
        layout = Layout(scored, inferred, self.max_plate_nesting if self._stacked else None)
        parts = {name: site["fn"].score_parts(site["value"]) for name, site in inferred.items()}
        for name, site in inferred.items():
            site["log_prob"] = parts[name].log_prob
        for site in scored.values():
            site["log_prob"] = site["fn"].log_prob(site["value"])
        if is_validation_enabled():
            for site in (*inferred.values(), *scored.values()):
                check_site_shape(site, self.max_plate_nesting)
        drawn = [
            site
            for name, site in inferred.items()
            if not is_identically_zero(parts[name].score_function)
        ]
        score = layout.total(drawn, lambda s: parts[s["name"]].score_function, raised=False)
        return _Run(
            log_model=layout.total(scored.values(), lambda s: s["log_prob"]),
            log_guide=layout.total(inferred.values(), lambda s: s["log_prob"]),
            score=score if drawn else None,
            scale=layout.scale,
            beta=layout.beta,
            leaves=draws.leaves,
        )

    @property
    def _stacked(self) -> bool:
        """Whether one run holds all particles, as its leftmost dimension."""
        return bool(self.vectorize_particles) and self.num_particles > 1

    def _runs(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[list[_Run], Tensor]:
        """Run the pair; return the runs and the log weights, (K, ...)."""
        # Particles of one datum must meet it in every run, also where each run subsamples.
        runs = list(self._get_traces(model, same_rows()(guide), args, kwargs))
        tables = [run.log_model - run.log_guide for run in runs]
        return runs, tables[0] if self._stacked else torch.stack(tables)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return minus one draw of the bound, summed over data, in nats."""
        with torch.no_grad():
            runs, table = self._runs(model, guide, args, kwargs)
            bound = table.logsumexp(0) - math.log(self.num_particles)
            return -float((runs[0].scale * bound).sum())

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the same as a tensor whose gradient is the estimator that was asked for."""
        runs, table = self._runs(model, guide, args, kwargs)
        scale, fixed = runs[0].scale, table.detach()
        bound = fixed.logsumexp(0) - math.log(self.num_particles)
        weights = fixed.softmax(0)
        # Weights far below rounding would make denormal gradients, many times slower to multiply.
        weights = weights.masked_fill(weights < torch.finfo(weights.dtype).eps ** 2, 0.0)
        surrogate: Tensor | float = 0.0
        for run, own in zip(runs, [weights] if self._stacked else weights, strict=True):
            share = scale * own
            # What has no weight may have a density of zero: 0 times minus infinity is 0 here.
            log_model = torch.where(own > 0, run.log_model, 0.0)
            surrogate = surrogate + (share * log_model).sum()
            if self.gradient == "standard":
                surrogate = surrogate - (share * run.log_guide).sum()
            else:
                inside = (share * (log_model - run.log_guide)).sum()
                surrogate = surrogate + self._along_draws(run, inside, own)
            if run.score is not None:
                surrogate = surrogate + (scale * bound * run.score).sum()
        moving = torch.as_tensor(surrogate)
        return -((scale * bound).sum() + moving - moving.detach())

    def _along_draws(self, run: _Run, inside: Tensor, weight: Tensor) -> Tensor | float:
        """Return a term whose gradient reaches the guide through its draws and in no other way."""
        leaves = [item.leaf for item in run.leaves]
        if not leaves:
            return 0.0
        slopes = list(torch.autograd.grad(inside, leaves, retain_graph=True, allow_unused=True))
        factor: Tensor | None = None
        if self.gradient == _DOUBLY and self.num_particles > 1:
            factor = (1.0 - run.beta) + run.beta * weight
        slopes = [self._weighed(s, factor, it) for s, it in zip(slopes, run.leaves, strict=True)]
        # A later draw hangs on earlier ones by its law as well: from the last one to the first.
        for index in reversed(range(1, len(leaves))):
            back = torch.autograd.grad(
                run.leaves[index].drawn,
                leaves[:index],
                slopes[index],
                retain_graph=True,
                allow_unused=True,
            )
            for earlier, more in enumerate(back):
                if more is not None:
                    slopes[earlier] = slopes[earlier] + more
        pairs = zip(run.leaves, slopes, strict=True)
        return sum((item.drawn * slope).sum() for item, slope in pairs)

    @staticmethod
    def _weighed(slope: Tensor | None, factor: Tensor | None, item: Leaf) -> Tensor:
        if slope is None:
            return torch.zeros_like(item.leaf)
        if factor is None:
            return slope
        batch = slope.dim() - item.event_dim
        shape = factor.shape[max(0, factor.dim() - batch) :]
        return slope * factor.reshape(*shape, *[1] * item.event_dim)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return minus one draw of the bound and add its gradient to all parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)  # type: ignore[no-untyped-call]
        return loss.item()
