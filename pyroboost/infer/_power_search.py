"""The power of a part of a product: searched on one set of draws, and judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pyroboost.compose.partition import doubt_of
from pyroboost.sampling import log_mean_exp
from pyroboost.sampling.psis import pareto_k

__all__ = ["Choice", "RoundVerdict", "Search"]

RoundVerdict = Literal["base", "grows", "nothing gained", "worse", "in doubt"]

_PARETO_DRAWS = 25
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class Choice:
    """A power, what it gains with which error, and whether log Z there is in doubt."""

    power: float
    gain: float
    error: float
    doubted: bool

    @property
    def verdict(self) -> RoundVerdict:
        """Say what the gain means, at two standard errors."""
        if self.doubted:
            return "in doubt"
        if self.gain > 2 * self.error and self.gain > 0:
            return "grows"
        return "nothing gained" if self.gain >= -2 * self.error else "worse"


class Search:
    """The gain of a power, on one set of draws and of data.

    Args:
        before: log weights of the draws under the product so far.  # (n,)
        new: log density of the new part at the draws.  # (n,)
        data: the same at the data.  # (N,)
        summed: whether the draws are all states, each once, so that log Z is exact.
    """

    def __init__(self, before: Tensor, new: Tensor, data: Tensor, summed: bool) -> None:
        self.before, self.new, self.data, self.summed = before, new, data.double(), summed

    def gain(self, alpha: float) -> float:
        """Return by how much the mean log-likelihood exceeds that at 0."""
        change = log_mean_exp(self.before + alpha * self.new).value
        change = change - log_mean_exp(self.before).value
        return float(alpha * self.data.mean() - change)

    def at(self, alpha: float) -> Choice:
        """Return the gain at a power with its error and its doubt."""
        if not alpha > 0:
            raise ValueError(f"multiplicative: alphas hold {alpha}; powers are positive.")
        # What each draw does to log Z(alpha) - log Z(0), by the delta method.
        change = (self.before + alpha * self.new).softmax(0) - self.before.softmax(0)
        spread = 0.0 if self.summed else float(change.std()) * math.sqrt(len(change))
        over_data = alpha * float(self.data.std()) / math.sqrt(len(self.data))
        # Densities that are equal but for rounding must not pass for a gain or a loss.
        rounding = 1e-7 * max(1.0, alpha * float(self.data.abs().mean()))
        error = math.hypot(spread, over_data, rounding)
        return Choice(alpha, self.gain(alpha), error, self.doubted(alpha))

    def doubted(self, alpha: float) -> bool:
        """Tell whether Pareto k at this power is too large."""
        if self.summed:
            return False
        weights = self.before + alpha * self.new
        k = float(pareto_k(weights)) if len(weights) >= _PARETO_DRAWS else math.inf
        return doubt_of(k, len(weights)) is not None

    def best(self, largest: float) -> Choice:
        """Return the power that gains most, brought down to where log Z can be trusted."""
        low, high = 0.0, largest
        for _ in range(60):
            left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            low, high = (low, right) if self.gain(left) >= self.gain(right) else (left, high)
        alpha = max(0.5 * (low + high), 1e-6)
        alpha = largest if self.gain(largest) >= self.gain(alpha) else alpha
        for _ in range(20):
            if not self.doubted(alpha):
                break
            alpha *= 0.7
        return self.at(alpha)
