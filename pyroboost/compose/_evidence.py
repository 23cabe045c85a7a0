"""Weights of pairs with their gradients, and sums of densities with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyroboost.handlers import is_plate
from pyroboost.likelihood import Likelihood, weakest
from pyroboost.metamodel import MetaModel
from pyroboost.traces import data_plates, datum_log_prob

__all__ = ["Evidence", "evidence", "log_sum"]


class Evidence(NamedTuple):
    r"""One draw of a pair's importance weight per datum, for training.

    Args:
        log_weight: $\log r$ with $E[r] = m(x)$, with its pathwise gradient.  # (N,)
        score: the score of draws without a pathwise gradient, of value 0.  # (N,)
        scale: the factor of plates that take a subsample, in neither of them.
    """

    log_weight: Tensor
    score: Tensor
    scale: Tensor | float = 1.0


def evidence(part: MetaModel, x: Tensor, args: Sequence[Any]) -> Evidence:
    """Weigh a pair's draws, its hidden site summed out where it knows how.

    Args:
        part: a meta-model.
        x: data.  # (N, ...)
        args: further arguments.

    Returns:
        The log mean weight of as many draws as the pair sees its data through.
    """
    own = getattr(part, "draw_evidence", None)  # a mixture's: it sums its components out
    if own is not None:
        found: Evidence = own(x, *args)
        return found
    draws = [_one(part, x, args) for _ in range(part.num_particles)]
    weights = torch.stack([one.log_weight for one in draws])
    score = torch.stack([one.score for one in draws]).sum(0)
    return Evidence(weights.logsumexp(0) - math.log(len(draws)), score, draws[0].scale)


def _one(part: MetaModel, x: Tensor, args: Sequence[Any]) -> Evidence:
    guide = poutine.trace(part.guide).get_trace(x, *args)
    program = part.marginal or part.model
    model = poutine.trace(poutine.replay(program, trace=guide)).get_trace(x, *args)
    count, scale = len(model.nodes[part.visible]["value"]), model.nodes[part.visible]["scale"]
    plates = data_plates(guide.nodes[part.hidden], count)
    model.compute_score_parts()
    guide.compute_score_parts()
    total: Any = 0.0
    score: Any = 0.0
    for name, site in model.nodes.items():
        if not _random(site):
            continue
        if site["is_observed"] or name in guide.nodes:
            total = total + datum_log_prob(site, count, plates)
        else:  # drawn from its prior
            score = score + _score(site, count, plates)
    for name, site in guide.nodes.items():
        summed_out = name not in model.nodes and part.marginal is not None
        if _random(site) and not summed_out:
            total = total - datum_log_prob(site, count, plates)
            score = score + _score(site, count, plates)
    if isinstance(score, Tensor):
        return Evidence(total, score - score.detach(), scale)
    return Evidence(total, torch.zeros_like(total), scale)


def _random(site: dict[str, Any]) -> bool:
    return (
        site["type"] == "sample" and not is_plate(site) and not site["infer"].get("_deterministic")
    )


def _score(site: dict[str, Any], count: int, plates: frozenset[str]) -> Tensor | float:
    found = site["score_parts"].score_function
    if site["is_observed"] or not isinstance(found, Tensor):
        return 0.0
    return datum_log_prob({**site, "unscaled_log_prob": found}, count, plates)


def log_sum(log_weights: Tensor, terms: Sequence[Likelihood]) -> Likelihood:
    r"""Return the log of a weighted sum of densities, with the error that theirs give it.

    $$\log \sum_i w_i e^{l_i}, \qquad \mathrm{se}^2 = \sum_i \rho_i^2\, \mathrm{se}_i^2, \qquad
    \rho_i \propto w_i e^{l_i}$$

    Args:
        log_weights: normalised.  # (K,)
        terms: log densities of K models, of independent errors.
    """
    table = torch.stack([term.value for term in terms], -1) + log_weights
    shares = table.detach().softmax(-1)
    variance = sum(
        (share * term.std_error).square()
        for share, term in zip(shares.unbind(-1), terms, strict=True)
        if term.std_error is not None
    )
    constants = [term.shared_error for term in terms]
    shared = [float(s.mean()) * e for s, e in zip(shares.unbind(-1), constants, strict=True)]
    return Likelihood(
        table.logsumexp(-1),
        weakest(*(term.kind for term in terms)),
        std_error=variance.sqrt() if isinstance(variance, Tensor) else None,
        num_samples=max(term.num_samples for term in terms),
        shared_error=math.hypot(*shared),
        doubt=next((term.doubt for term in terms if term.doubt is not None), None),
    )
