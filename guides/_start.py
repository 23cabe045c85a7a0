"""Normal laws at which to start: Laplace and Pathfinder from several points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from torch import Tensor
from torch.distributions import biject_to

from pyroboost.guides._climb import newton, pulled, quasi_newton, with_precision
from pyroboost.guides._placement import Whitening
from pyroboost.guides._target import Target

__all__ = ["Candidate", "candidates", "distinct", "follow", "refine", "starting_points"]

_ELBO_DRAWS = 32
_ON_PATH = 12  # points of a path whose laws are compared
_REFINED = 4  # laws that are improved by natural gradients
_REFINE_STEPS = 20
_REFINE_DRAWS = 64


@dataclass(frozen=True)
class Candidate:
    """A normal law and its evidence lower bound, in nats."""

    law: Whitening = field(repr=False)
    elbo: float


def starting_points(
    target: Target,
    model: Callable[..., Any],
    sites: Sequence[tuple[str, dict[str, Any]]],
    count: int,
) -> list[Tensor]:
    """Return where paths begin: the target's own start, draws from the prior and uniform ones.

    Only those with a finite log density are returned, so there may be fewer than asked for.

    Args:
        target: the log density.
        model: the program, to draw from its prior.
        sites: names and nodes of the latent sites.
        count: how many.
    """
    drawn = []
    for _ in range(4 * (count - 1)):
        uniform = torch.empty(target.dim).uniform_(-2.0, 2.0).to(target.start)
        try:
            drawn.append(_prior_draw(target, model, sites))
        except NotImplementedError:  # an improper prior
            pass
        drawn.append(uniform)
    every = torch.stack([target.start, *drawn])
    return list(every[target(every).isfinite()][:count])


def _prior_draw(
    target: Target, model: Callable[..., Any], sites: Sequence[tuple[str, dict[str, Any]]]
) -> Tensor:
    with poutine.block():
        drawing = poutine.condition(InitMessenger(init_to_sample)(model), data=target.fixed)
        trace = poutine.trace(drawing).get_trace(*target.args, **target.kwargs)
    free = [biject_to(site["fn"].support).inv(trace.nodes[name]["value"]) for name, site in sites]
    return torch.cat([value.reshape(-1) for value in free]).to(target.start)


def candidates(
    target: Target, starts: Sequence[Tensor], *, laplace: bool, full: int
) -> list[Candidate]:
    """Follow a path uphill from every start; return the laws found, the best bound first.

    Args:
        target: the log density.
        starts: points.  # each (D)
        laplace: take the end of every path; else the point of it whose law has the best bound.
        full: the largest D for which second derivatives are exact.
    """
    found = [follow(target, start, laplace=laplace, full=full) for start in starts]
    kept = distinct([one for one in found if one is not None])
    if laplace or target.dim > full:
        return kept
    return distinct([*(refine(target, one) for one in kept[:_REFINED]), *kept[_REFINED:]])


def distinct(found: Sequence[Candidate]) -> list[Candidate]:
    """Sort by the bound and leave out laws that stand within a better one of similar width."""
    kept: list[Candidate] = []
    for one in sorted(found, key=lambda c: -c.elbo):
        if all(_apart(one.law, other.law) for other in kept):
            kept.append(one)
    return kept


def _apart(one: Whitening, other: Whitening) -> bool:
    """Tell whether two laws differ: in place, or by a factor of e in volume."""
    nearer = min(float(a.pull(b.loc)[0].square().mean()) for a, b in ((one, other), (other, one)))
    return nearer > 0.5 or abs(float(one.log_volume - other.log_volume)) > 1.0


def follow(target: Target, start: Tensor, *, laplace: bool, full: int) -> Candidate | None:
    """Climb from a start and return the law chosen on the way, or None if there is none."""
    climb = newton if target.dim <= full else quasi_newton
    path = climb(target, start.double())
    if not path:
        return None
    if laplace:
        path = path[-1:]
    else:
        chosen = torch.linspace(0, len(path) - 1, min(_ON_PATH, len(path))).round().long()
        path = [path[i] for i in sorted(set(chosen.tolist()))]
    bounds = elbos(target, path)
    best = int(bounds.argmax())
    if not math.isfinite(bounds[best]) and not laplace:
        return None
    return Candidate(path[best], float(bounds[best]))


@torch.no_grad()
def elbos(target: Target, laws: Sequence[Whitening], draws: int = _ELBO_DRAWS) -> Tensor:
    """Return an estimate of each law's evidence lower bound, in nats, (L)."""
    points = torch.stack([law.draw(draws) for law in laws])
    log_p = target(points.flatten(0, 1).to(target.start)).double().reshape(points.shape[:2])
    log_q = torch.stack([law.log_prob(x) for law, x in zip(laws, points, strict=True)])
    return (log_p - log_q).mean(1).nan_to_num(nan=-math.inf)


@torch.no_grad()
def refine(target: Target, one: Candidate) -> Candidate:
    r"""Raise the bound of a normal law by natural gradients, over draws that stay the same.

    .. math:: P \leftarrow (1 - r) P - r\, E[\nabla^2 \log p], \qquad
        m \leftarrow m + r P^{-1} E[\nabla \log p]

    A step that does not raise it is taken back and shortened.
    """
    law, dim = one.law, target.dim
    noise = _even(_REFINE_DRAWS, dim)
    few = _even(max(2, min(_REFINE_DRAWS, 2000 // dim)), dim)
    best, rate = _bound(target, law, noise), 0.5
    for _ in range(_REFINE_STEPS):
        points = law.push(few)[0]
        try:
            curvature = target.hessian(points)
        except (RuntimeError, ValueError):
            break
        slope = target.gradient(points)[1].mean(0)
        mixed = with_precision(target, law.loc, (1 - rate) * _precision(law) - rate * curvature)
        if mixed is None or not bool(slope.isfinite().all()):
            break
        moved = law.loc + rate * (mixed.push(pulled(mixed, slope))[0] - law.loc)
        new = Whitening.of(moved, mixed.scale, mixed.basis, mixed.stretch)
        value = _bound(target, new, noise)
        if value > best:
            small = value < best + 0.01
            law, best, rate = new, value, min(1.0, 2 * rate)
            if small:
                break
        else:
            rate /= 4
            if rate < 0.01:
                break
    return Candidate(law, float(elbos(target, [law], 2 * _REFINE_DRAWS)[0]))


def _even(half: int, dim: int) -> Tensor:
    """Return normal noise that is symmetric, with a variance of exactly one."""
    noise = torch.randn(half, dim, dtype=torch.float64)
    noise = noise / noise.square().mean(0).sqrt()
    return torch.cat([noise, -noise])


def _bound(target: Target, law: Whitening, noise: Tensor) -> float:
    """Return the evidence lower bound of a law on given noise, up to a constant."""
    log_p = target(law.push(noise)[0].to(target.start)).double()
    return float((log_p.mean() + law.log_volume).nan_to_num(nan=-math.inf))


def _precision(law: Whitening) -> Tensor:
    """Return the inverse covariance of a law of full rank or less, (D, D)."""
    rows = law.pull(torch.eye(law.dim, dtype=torch.float64) + law.loc)[0]
    return rows @ rows.mT
