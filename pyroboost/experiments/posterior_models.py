"""Posteriors of many shapes, each with reference draws: what a guide is tried on.

Every program takes a batch of points outside its plates, so that particles are drawn in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["POSTERIORS", "Posterior"]

Draws = dict[str, Tensor]
Sampler = Callable[..., Draws]
_EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
_EXACT = 20_000


@dataclass(frozen=True)
class Posterior:
    """A model with its data and a way to draw from its posterior.

    Args:
        model: the program.
        data: builds its arguments from a generator.
        reference: draws from the posterior, given a function that runs NUTS on a program with
            its data and, by name, values of sites at which to start.
        words: where the reference comes from.
        judged: what of the draws of NUTS, (chains, draws, ...) each, says whether they have mixed,
            where labels that switch do not matter.
    """

    model: Callable[..., Any]
    data: Callable[[torch.Generator], tuple[Any, ...]]
    reference: Callable[[Sampler, tuple[Any, ...], torch.Generator], Draws]
    words: str = "NUTS"
    judged: Callable[[Draws], Draws] = dict


def _none(generator: torch.Generator) -> tuple[Any, ...]:
    return ()


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


# Eight schools: Rubin (1981), as in Gelman et al., Bayesian data analysis, section 5.5


def _schools(generator: torch.Generator) -> tuple[Any, ...]:
    return torch.tensor(_EFFECTS), torch.tensor(_ERRORS)


def centred(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, effects drawn around their mean."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y), dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def non_centred(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, effects as standard normal numbers that are shifted and scaled."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y), dim=-1):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def _centred_draws(run: Sampler, data: tuple[Any, ...], generator: torch.Generator) -> Draws:
    found = run(non_centred, data)
    theta = found["mu"][:, None] + found["tau"][:, None] * found["eta"]
    return {"mu": found["mu"], "tau": found["tau"], "theta": theta}


# Shapes whose draws are known


def funnel() -> None:
    """Neal's funnel: nine coordinates whose common log variance is the tenth."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(9), (v / 2).exp()[..., None]).to_event(1))


def _funnel_draws(run: Sampler, data: tuple[Any, ...], generator: torch.Generator) -> Draws:
    v = 3 * _randn(generator, _EXACT)
    return {"v": v, "x": (v / 2).exp()[:, None] * _randn(generator, _EXACT, 9)}


def banana() -> None:
    """A normal law bent along a parabola."""
    a = pyro.sample("a", dist.Normal(0.0, 3.0))
    pyro.sample("b", dist.Normal(0.5 * a * a - 4.5, 1.0))


def _banana_draws(run: Sampler, data: tuple[Any, ...], generator: torch.Generator) -> Draws:
    a = 3 * _randn(generator, _EXACT)
    return {"a": a, "b": 0.5 * a * a - 4.5 + _randn(generator, _EXACT)}


# A mixture whose labels can be exchanged


def _two_groups(generator: torch.Generator) -> tuple[Any, ...]:
    first = torch.rand(60, generator=generator) < 0.5
    return (torch.where(first, -1.5, 1.5) + _randn(generator, 60),)


def mixture(y: Tensor) -> None:
    """Two normal groups of equal prior: every posterior point has a twin with labels exchanged."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5).expand([2]).to_event(1))
    share = pyro.sample("share", dist.Beta(5.0, 5.0))
    log_share = torch.stack([share.log(), (-share).log1p()], -1)
    with pyro.plate("data", len(y), dim=-1):
        z = (y[:, None] - mu) / sigma
        terms = log_share - 0.5 * z * z - sigma.log() - 0.5 * math.log(2 * math.pi)
        pyro.factor("y", terms.logsumexp(-1))


def _mixture_draws(run: Sampler, data: tuple[Any, ...], generator: torch.Generator) -> Draws:
    found = run(mixture, data, mu=torch.tensor([-1.5, 1.5]))
    swap = torch.rand(len(found["share"]), generator=generator) < 0.5
    for name in ("mu", "sigma"):
        found[name] = torch.where(swap[:, None], found[name].flip(-1), found[name])
    found["share"] = torch.where(swap, 1 - found["share"], found["share"])
    return found


def _by_size(found: Draws) -> Draws:
    """Label the groups by their means."""
    order = found["mu"].argsort(-1)
    share = torch.where(order[..., 0] == 0, found["share"], 1 - found["share"])
    return {n: found[n].gather(-1, order) for n in ("mu", "sigma")} | {"share": share}


# Regressions


def _linear(x: Tensor, weights: Tensor) -> Tensor:
    """Return x w, (N), for weights (D), or (S, N) for a batch of them, (S, 1, D)."""
    found = weights @ x.mT
    return found.squeeze(-2) if found.dim() > 1 else found


def _sparse(generator: torch.Generator) -> tuple[Any, ...]:
    x = _randn(generator, 40, 8)
    weights = torch.tensor([3.0, -2.0, *([0.0] * 6)])
    return x, x @ weights + _randn(generator, 40)


def horseshoe(x: Tensor, y: Tensor) -> None:
    """A regression whose weights are mostly near zero, with half-Cauchy scales."""
    tau = pyro.sample("tau", dist.HalfCauchy(0.3))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    size = pyro.sample("size", dist.HalfCauchy(1.0).expand([8]).to_event(1))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
    with pyro.plate("data", len(y), dim=-1):
        pyro.sample("y", dist.Normal(_linear(x, tau[..., None] * size * z), sigma), obs=y)


def _raw(generator: torch.Generator) -> tuple[Any, ...]:
    scales, centres = torch.tensor([800.0, 3.0, 0.02]), torch.tensor([3000.0, 40.0, 1.0])
    x = centres + scales * _randn(generator, 100, 3)
    y = 5.0 + x @ torch.tensor([0.01, -0.5, 20.0]) + 1.5 * _randn(generator, 100)
    return torch.cat([torch.ones(100, 1), x], 1), y


_SPREAD = torch.tensor([100.0, 1.0, 10.0, 100.0])  # of the weights, in units of the noise


def raw_scale(x: Tensor, y: Tensor) -> None:
    """A conjugate regression on predictors as they are measured, some in the thousands."""
    precision = pyro.sample("precision", dist.Gamma(2.0, 2.0))
    noise = precision.rsqrt()
    weights = pyro.sample("weights", dist.Normal(0.0, noise[..., None] * _SPREAD).to_event(1))
    with pyro.plate("data", len(y), dim=-1):
        pyro.sample("y", dist.Normal(_linear(x, weights), noise), obs=y)


def _raw_draws(run: Sampler, data: tuple[Any, ...], generator: torch.Generator) -> Draws:
    x, y = (part.double() for part in data)
    inner = x.mT @ x + _SPREAD.double().square().reciprocal().diag()
    mean = torch.linalg.solve(inner, x.mT @ y)
    shape, rate = 2 + len(y) / 2, 2 + 0.5 * float(y @ y - mean @ inner @ mean)
    precision = torch.from_numpy(_gammas(shape, generator)) / rate
    noise = torch.randn(_EXACT, 4, generator=generator, dtype=torch.float64)
    lower = torch.linalg.cholesky(inner)
    weights = torch.linalg.solve_triangular(lower.mT, noise.mT, upper=True).mT
    weights = mean + weights * precision.rsqrt()[:, None]
    return {"precision": precision.float(), "weights": weights.float()}


def _gammas(shape: float, generator: torch.Generator) -> Any:
    import numpy as np

    seed = int(torch.randint(2**31, (), generator=generator))
    return np.random.default_rng(seed).gamma(shape, size=_EXACT)


# A Gaussian process and a hidden Markov model, their functions and states summed out


def _wave(generator: torch.Generator) -> tuple[Any, ...]:
    x = torch.linspace(-2, 2, 25)
    return x, torch.sin(2 * x) + 0.3 * _randn(generator, 25)


def process(x: Tensor, y: Tensor) -> None:
    """The scales of a Gaussian process with a squared exponential kernel."""
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    height = pyro.sample("height", dist.LogNormal(0.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
    far = (x[:, None] - x).square()
    wide = [part.square()[..., None, None] for part in (length, height, noise)]
    # A thousandth of the height on the diagonal keeps the matrix positive definite in float32.
    diagonal = (wide[2] + 1e-3 * wide[1] + 1e-4) * torch.eye(len(x))
    cov = wide[1] * (-0.5 * far / wide[0]).exp() + diagonal
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), cov), obs=y)


def _chain(generator: torch.Generator) -> tuple[Any, ...]:
    state, values = 0, []
    for change in torch.rand(60, generator=generator).tolist():
        state = 1 - state if change < 0.15 else state
        values.append(float(2.0 * state + 0.7 * _randn(generator, 1)))
    return (torch.tensor(values),)


def hidden_markov(y: Tensor) -> None:
    """Two hidden states that stay for a while, with normal observations and ordered means."""
    stay = pyro.sample("stay", dist.Beta(4.0, 1.0).expand([2]).to_event(1))
    low = pyro.sample("low", dist.Normal(0.0, 2.0))
    step = pyro.sample("step", dist.LogNormal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(-0.5, 0.5))
    change = 1 - stay
    rows = [(stay[..., 0], change[..., 0]), (change[..., 1], stay[..., 1])]
    log_move = torch.stack([torch.stack(row, -1) for row in rows], -2).clamp(min=1e-30).log()
    means, sd = torch.stack([low, low + step], -1), sigma[..., None]
    z = (y.reshape(-1, *(1,) * means.dim()) - means) / sd
    seen = -0.5 * z * z - sd.log() - 0.5 * math.log(2 * math.pi)
    forward = seen[0] - math.log(2)
    for t in range(1, len(y)):
        forward = (forward[..., None] + log_move).logsumexp(-2) + seen[t]
    pyro.factor("y", forward.logsumexp(-1))


def _by_nuts(
    model: Callable[..., Any],
) -> Callable[[Sampler, tuple[Any, ...], torch.Generator], Draws]:
    return lambda run, data, generator: run(model, data)


POSTERIORS: dict[str, Posterior] = {
    "eight schools, centred": Posterior(
        centred, _schools, _centred_draws, "NUTS on the non-centred form, transformed"
    ),
    "eight schools, non-centred": Posterior(non_centred, _schools, _by_nuts(non_centred)),
    "funnel": Posterior(funnel, _none, _funnel_draws, "exact draws"),
    "banana": Posterior(banana, _none, _banana_draws, "exact draws"),
    "label switching": Posterior(
        mixture,
        _two_groups,
        _mixture_draws,
        "NUTS, each draw relabelled by a coin; R-hat and ESS are of groups labelled by their means",
        _by_size,
    ),
    "horseshoe": Posterior(horseshoe, _sparse, _by_nuts(horseshoe)),
    "raw-scale regression": Posterior(raw_scale, _raw, _raw_draws, "exact conjugate draws"),
    "Gaussian process": Posterior(process, _wave, _by_nuts(process)),
    "hidden Markov": Posterior(hidden_markov, _chain, _by_nuts(hidden_markov)),
}
