r"""Annealed importance sampling along a geometric path between any two densities.

:mod:`pyroboost.sampling.ais` anneals the parameters of one kind of energy and sums a layer out;
here the path is between two functions, and the transitions are handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["AnnealedPath", "Transition", "annealed_path"]

Terms = Callable[[Tensor], Tensor]
Transition = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Moves states and their terms, leaving the law with the given coefficients as it is."""


class AnnealedPath(NamedTuple):
    """Chains at the end of a path.

    Attributes:
        log_weights: log weights whose natural-scale mean estimates Z_target / Z_start.  # (C,)
        state: the states reached.  # (C, *E)
        terms: terms of their log densities.  # (P, C)
    """

    log_weights: Tensor
    state: Tensor
    terms: Tensor


@torch.no_grad()
def annealed_path(
    state: Tensor,
    terms: Terms,
    transition: Transition,
    *,
    start: Tensor,
    end: Tensor,
    inverse_temperatures: Tensor,
) -> AnnealedPath:
    r"""Weigh chains that are led from one law to another.

    .. math:: \log w = \sum_k (\beta_{k+1} - \beta_k)
        (\log \tilde q(x_k) - \log m_0(x_k)), \qquad
        \log \pi_\beta = (1 - \beta) \log m_0 + \beta \log \tilde q

    with :math:`x_0 \sim m_0` and :math:`x_{k}` from a transition that leaves
    :math:`\pi_{\beta_k}` invariant. Both ends are sums of the same terms with coefficients of
    their own. The mean weight is unbiased for the ratio of constants.

    Args:
        state: independent draws of the law at 0.  # (C, *E)
        terms: the terms of both log densities.  # (C, *E) -> (P, C)
        transition: moves states, given their terms and the coefficients of the law to leave.
        start: coefficients of :math:`\log m_0`.  # (P,)
        end: coefficients of :math:`\log \tilde q`.  # (P,)
        inverse_temperatures: the schedule, rising from 0 to 1.  # (K + 1,)

    Returns:
        Weights and last states.

    Raises:
        ValueError: the schedule does not rise from 0 to 1.

    Example:
        >>> found = annealed_path(
        ...     torch.zeros(2, 1),
        ...     lambda x: torch.full((1, len(x)), 3.0),
        ...     lambda state, terms, coefficients: (state, terms),
        ...     start=torch.zeros(1),
        ...     end=torch.ones(1),
        ...     inverse_temperatures=torch.linspace(0, 1, 5),
        ... )
        >>> found.log_weights.tolist()
        [3.0, 3.0]

    Reference:
        Neal, Annealed importance sampling (2001), section 2.
    """
    schedule = inverse_temperatures.double().tolist()
    rising = all(a <= b for a, b in pairwise(schedule))
    if len(schedule) < 2 or not rising or schedule[0] != 0.0 or schedule[-1] != 1.0:
        raise ValueError(
            "annealed_path: inverse_temperatures must be one list of numbers rising from 0 to 1."
        )
    held = terms(state)
    start, end = start.double(), end.double()
    log_weights = state.new_zeros(len(state), dtype=torch.float64)
    for beta, following in pairwise(schedule):
        log_weights += (following - beta) * ((end - start) @ held.double())
        if following < 1.0:
            state, held = transition(state, held, torch.lerp(start, end, following))
    return AnnealedPath(log_weights, state, held)
