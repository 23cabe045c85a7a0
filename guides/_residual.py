"""Where the current mixture falls short of the posterior: places for its next component."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyroboost.distributions import BoostedFlow
from pyroboost.guides._placement import Whitening
from pyroboost.guides._start import follow
from pyroboost.guides._target import Target

__all__ = ["gains", "missing", "ranked"]

_DRAWS = 512
_SHARES = (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)  # weights tried for a new component
_WIDER = 2.0
_CLIMBS = 2


@torch.no_grad()
def ranked(
    target: Target, mixture: BoostedFlow, laws: Sequence[Whitening], frame: Whitening, full: int
) -> list[Whitening]:
    """Return laws at which a new component could start, the one that helps most first.

    Args:
        target: the log density.
        mixture: the present posterior.
        laws: laws to be tried besides those found here.
        frame: the law in whose coordinates the components stand.
        full: the largest D with full covariances.
    """
    tried = [*laws, *missing(target, mixture, frame, full)]
    found = gains(target, mixture, tried)
    order = found.argsort(descending=True).tolist()
    return [tried[i] for i in order if bool(found[i].isfinite())]


@torch.no_grad()
def gains(target: Target, mixture: BoostedFlow, laws: Sequence[Whitening]) -> Tensor:
    r"""Return how much each law would raise the bound of the mixture, with its best weight.

    .. math:: \max_w\; w E_N[\log p - \log q_w] + (1 - w) E_G[\log p - \log q_w]
        - E_G[\log p - \log G], \qquad q_w = w N + (1 - w) G

    Args:
        target: log p.
        mixture: G.
        laws: the laws N.

    Returns:
        Gains in nats; minus infinity where a law reaches beyond the support.  # (L)
    """
    old = mixture.sample((_DRAWS,))
    log_p, log_g = _scores(target, mixture, old)
    present = (log_p - log_g).mean()
    return (
        torch.stack([_gain(target, mixture, law, old.to(law.loc), log_p, log_g) for law in laws])
        - present
    )


def _gain(
    target: Target, mixture: BoostedFlow, law: Whitening, old: Tensor, log_p: Tensor, log_g: Tensor
) -> Tensor:
    new = law.draw(_DRAWS)
    new_p, new_g = _scores(target, mixture, new)
    best = []
    for share in _SHARES:
        own, rest = math.log(share), math.log1p(-share)
        at_new = new_p - torch.logaddexp(law.log_prob(new) + own, new_g + rest)
        at_old = log_p - torch.logaddexp(law.log_prob(old) + own, log_g + rest)
        best.append(share * at_new.mean() + (1 - share) * at_old.mean())
    return torch.stack(best).nan_to_num(nan=-math.inf).max()


def missing(target: Target, mixture: BoostedFlow, frame: Whitening, full: int) -> list[Whitening]:
    """Return laws where p exceeds Z times the mixture, by draws of it and of wider laws.

    Among them are the moments of what is missing, the frame's shape at points drawn from it, and
    laws found uphill of such points.
    """
    wide = _wider(frame, mixture)
    points = torch.cat([mixture.sample((_DRAWS,)).to(wide.loc), wide.draw(_DRAWS)])
    log_p, log_g = _scores(target, mixture, points)
    log_q = torch.logaddexp(log_g, wide.log_prob(points)) - math.log(2)
    log_w = (log_p - log_q).nan_to_num(nan=-math.inf)
    if not bool(log_w.isfinite().any()):
        return []
    share = log_w.softmax(0)
    left = (share - (log_g - log_q).softmax(0)).clamp(min=0)
    if not bool(left.sum() > 0):
        return []
    chosen = points[left.multinomial(2 * _CLIMBS, replacement=True)]
    laws = [*_moments(points, left), *_moments(points, share)]
    laws += [_resized(frame, x, size) for x in chosen for size in (0.3, 1.0)]
    climbs = [follow(target, x, laplace=False, full=full) for x in chosen[:_CLIMBS]]
    return laws + [climb.law for climb in climbs if climb is not None]


def _wider(frame: Whitening, mixture: BoostedFlow) -> Whitening:
    """Return the frame's shape around the mixture, some times as wide as both."""
    draws = mixture.sample((_DRAWS,)).to(frame.loc)
    y = frame.pull(draws)[0]
    size = _WIDER * max(1.0, float(y.var(0).mean().sqrt()))
    wide = _resized(frame, draws.double().mean(0), size)
    return wide


def _resized(frame: Whitening, loc: Tensor, size: float) -> Whitening:
    parts = (loc, size * frame.scale, frame.basis, frame.stretch)
    return Whitening.of(*(part.double() for part in parts))


def _moments(points: Tensor, weights: Tensor) -> list[Whitening]:
    """Return the normal law of a weighted sample's moments, if there is enough of it."""
    weights = weights / weights.sum()
    ess, dim = float(1 / weights.square().sum()), points.shape[1]
    if ess < 5:
        return []
    loc = weights @ points
    centred = (points - loc) * weights.sqrt()[:, None]
    cov = centred.mT @ centred
    scale = cov.diagonal().clamp(min=1e-30).sqrt()
    shrunk = min(1.0, dim / ess)  # of the correlations, which few points cannot tell
    corr = (1 - shrunk) * cov / scale / scale[:, None] + shrunk * torch.eye(dim).to(cov)
    values, basis = torch.linalg.eigh(corr)
    return [Whitening.of(loc, scale, basis, values.clamp(min=1e-6).sqrt())]


def _scores(target: Target, mixture: BoostedFlow, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p and log G at points, (S) each, in double precision."""
    near = points.to(target.start)
    like = mixture.base.mean
    return target(near).double(), mixture.log_prob(points.to(like)).double()
