r"""Ratios of normalising constants from draws of both laws: the optimal bridge."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroboost.sampling.importance import effective_sample_size
from pyroboost.sampling.psis import pareto_k

__all__ = ["Bridge", "bridge_log_ratio"]

_LEAST = 25  # draws that a Pareto fit takes


class Bridge(NamedTuple):
    """A ratio of two constants and what is known of its error.

    Attributes:
        value: log (Z_target / Z_proposal), in nats.
        std_error: standard error, by the delta method.
        ess: the smaller effective sample size of the two averages that are divided.
        pareto_k: the larger Pareto k of their terms, which are bounded: it is large only where
            the two laws hardly overlap.
        converged: whether the fixed point was reached.
    """

    value: float
    std_error: float
    ess: float
    pareto_k: float
    converged: bool


def bridge_log_ratio(
    at_target: Tensor,
    at_proposal: Tensor,
    *,
    effective: float | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-10,
) -> Bridge:
    r"""Estimate the ratio of two normalising constants from draws of both laws.

    .. math:: r = \frac{Z_q}{Z_g} = \frac{\frac1{n_g} \sum_{x \sim g} \ell(x) /
        (s_q \ell(x) + s_g r)}{\frac1{n_q} \sum_{x \sim q} 1 / (s_q \ell(x) + s_g r)},
        \qquad \ell = \tilde q / \tilde g, \quad s_q = \frac{n_q}{n_q + n_g}

    Of all bridges this one has the least error for independent draws. Its terms are bounded, so
    that one bad draw cannot ruin it as it does an importance sample; draws of q that have not
    reached q can.

    Args:
        at_target: :math:`\log \ell` at draws of the target q.  # (n_q,)
        at_proposal: the same at draws of the proposal g.  # (n_g,)
        effective: how many independent draws those of the target are worth; n_q when left out.
        max_iterations: steps of the fixed point at most.
        tolerance: change of log r at which they end.

    Returns:
        log r in nats, its error, and how far to trust it.

    Raises:
        ValueError: there are no draws of one law, or a log ratio is NaN.

    Example:
        >>> bridge = bridge_log_ratio(torch.full((30,), 2.0), torch.full((40,), 2.0))
        >>> round(bridge.value, 6), round(bridge.std_error, 6)
        (2.0, 0.0)

    Reference:
        Meng and Wong, Simulating ratios of normalizing constants via a simple identity (1996),
        section 3; Fruehwirth-Schnatter (2004), section 3.3, for the error.
    """
    for name, values in (("at_target", at_target), ("at_proposal", at_proposal)):
        if values.dim() != 1 or not len(values) or bool(values.isnan().any()):
            raise ValueError(
                f"bridge_log_ratio: {name} has shape {tuple(values.shape)} or holds NaN; give one "
                "log ratio per draw."
            )
    up, down = at_proposal.detach().double(), at_target.detach().double()
    log_q = math.log(len(down)) - math.log(len(down) + len(up))
    log_g = math.log(len(up)) - math.log(len(down) + len(up))
    log_r, converged = float(down.median()), False
    for _ in range(max_iterations):
        above = up - torch.logaddexp(up + log_q, up.new_tensor(log_g + log_r))
        below = -torch.logaddexp(down + log_q, down.new_tensor(log_g + log_r))
        new = float(above.logsumexp(0) - below.logsumexp(0)) + math.log(len(down) / len(up))
        converged, log_r = abs(new - log_r) < tolerance, new
        if converged or not math.isfinite(new):
            break
    above = up - torch.logaddexp(up + log_q, up.new_tensor(log_g + log_r))
    below = -torch.logaddexp(down + log_q, down.new_tensor(log_g + log_r))
    count = len(down) if effective is None else min(effective, len(down))
    error = math.hypot(_relative(above, len(up)), _relative(below, count))
    sizes = (effective_sample_size(above), effective_sample_size(below) * count / len(down))
    k = max(
        [float(pareto_k(t)) for t in (above, below) if len(t) >= _LEAST],
        default=math.nan,
    )
    return Bridge(log_r, error, float(min(sizes)), k, converged)


def _relative(log_terms: Tensor, effective: float) -> float:
    """Return the standard error of a mean of terms over that mean."""
    terms = (log_terms - log_terms.max()).exp()
    return float(terms.std(correction=0) / terms.mean()) / math.sqrt(max(effective, 1.0))
