"""Weights of a boosted mixture: from stored log densities, along a line, or by Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyroboost.infer._mixture_table import Table

__all__ = ["WeightDescent", "WeightStep", "descend", "on_line", "on_simplex"]

_TINY = 1e-4  # weights below are zero, where the bound does not mind


@dataclass(frozen=True)
class WeightDescent:
    """How Algorithm 1 moves the weight of a new component: pass it as ``weights=``.

    Args:
        step: first step size.
        decay: step t is ``step / (1 + decay * t)``.
        largest: largest change of the weight in one step.
        tolerance: stop when the weight changes by less, after the least number of steps.
        least: least number of steps.
        most: largest number of steps.
        num_samples: draws of each component, in each step, for each datum.

    Reference:
        Giaquinto and Banerjee, Gradient boosted flows (2020), Algorithm 1, whose loop goes on
        while the change is above the tolerance.
    """

    step: float = 0.05
    decay: float = 0.05
    largest: float = 0.1
    tolerance: float = 1e-3
    least: int = 10
    most: int = 100
    num_samples: int = 10


class WeightStep(NamedTuple):
    """A step of a search for weights: the new component's weight, the estimate and its error.

    The estimate is the derivative of the negative bound for Algorithm 1, else the bound.
    """

    weight: float
    value: float
    error: float


def on_simplex(table: Table, start: Tensor, new: int) -> tuple[Tensor, list[WeightStep]]:
    """Return the weights of the largest bound on the stored draws, over the whole simplex.

    Args:
        table: draws of all components.
        start: weights to start from.  # (K)
        new: place of the new component, whose weight the steps name.
    """
    from scipy.optimize import minimize

    steps: list[WeightStep] = []

    def record(w: Tensor) -> None:
        bound = table.bound(w)
        steps.append(WeightStep(float(w[new]), bound.value, bound.error))

    best, least = start.double(), table.loss(start.double())[0]
    level = least  # the solver's tolerance is for numbers near one

    def loss(w: object) -> tuple[float, object]:
        value, slope = table.loss(torch.as_tensor(w))
        return value - level, slope.numpy()

    even = torch.full_like(best, 1 / len(best))
    for first in (0.5 * (best + even), even):
        found = minimize(
            loss,
            first.numpy(),
            jac=True,
            method="SLSQP",
            bounds=[(0.0, 1.0)] * len(best),
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1.0, "jac": lambda w: w * 0 + 1},
            options={"ftol": 1e-10, "maxiter": 300},
            callback=lambda w: record(_clean(torch.as_tensor(w))),
        )
        w = _clean(torch.as_tensor(found.x))
        value = table.loss(w)[0]
        if value < least:
            best, least = w, value
    record(best)
    return best, steps


def on_line(table: Table, start: Tensor, new: int) -> tuple[Tensor, list[WeightStep]]:
    """Return the weights of the largest bound with only the new component's share to choose."""
    from scipy.optimize import minimize_scalar

    steps: list[WeightStep] = []

    def loss(rho: float) -> float:
        bound = table.bound(_mixed(start, new, rho))
        steps.append(WeightStep(rho, bound.value, bound.error))
        return -bound.value

    grid = [0.0, 0.001, 0.01, *(i / 20 for i in range(1, 20)), 0.99, 1.0]
    values = [loss(rho) for rho in grid]
    i = min(range(len(grid)), key=values.__getitem__)
    around = (grid[max(0, i - 1)], grid[min(len(grid) - 1, i + 1)])
    found = minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-6})
    rho = float(found.x) if found.fun < values[i] else grid[i]
    return _mixed(start, new, rho), steps


def descend(
    draw: Callable[[int], Table], start: Tensor, new: int, options: WeightDescent
) -> tuple[Tensor, list[WeightStep]]:
    r"""Return weights by Algorithm 1, with the exact mixture density and fresh draws every step.

    $$\partial_\rho = E_g[\gamma] - E_G[\gamma], \qquad \gamma = \log((1 - \rho) G + \rho g) -
    \log p$$

    Args:
        draw: a table of fresh draws, by the number of the step.
        start: weights of the fixed mixture.  # (K)
        new: place of the new component.
        options: steps and stop.
    """
    rho, steps = 1.0 / len(start), []
    for t in range(options.most):
        w = _mixed(start, new, rho)
        share = -start.double()
        share[new] = 1.0
        slope, error = draw(t).slopes(w).combined(share)
        steps.append(WeightStep(rho, slope, error))
        move = -options.step / (1 + options.decay * t) * slope
        move = max(-options.largest, min(options.largest, move))
        before, rho = rho, min(1.0, max(0.0, rho + move))
        if t + 1 >= options.least and abs(rho - before) <= options.tolerance:
            break
    return _mixed(start, new, rho), steps


def _mixed(start: Tensor, new: int, rho: float) -> Tensor:
    """Return (1 - rho) G + rho g."""
    w = (1 - rho) * start.double()
    w[new] = rho
    return w


def _clean(w: Tensor) -> Tensor:
    w = torch.where(w < _TINY, torch.zeros_like(w), w)
    return w / w.sum()
