"""Steps that run one way only, and the planar and radial ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from pyroboost.flows.flow import Flow
from pyroboost.flows.step import Coefficients, Step

__all__ = ["ForwardOnly", "Planar", "Radial", "planar", "radial"]

UNITY = math.log(math.e - 1)  # where softplus is 1


class ForwardOnly(Step):
    r"""A step :math:`y = f(x)` whose inverse exists and has no closed form.

    Its density is known only at points that it has drawn itself, so it serves as the flow of one
    guide (`guides.FlowGuide`) and cannot be a component of a mixture.
    """

    @property
    def refusal(self) -> str | None:
        """Why this step cannot be inverted."""
        return "has no inverse in closed form"

    def _pull(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raise ValueError(f"Flow.inverse: step {self.label} {self.refusal}.")


class Planar(ForwardOnly):
    r"""A planar step: it stretches and squeezes along one direction.

    .. math:: y = x + \hat u \tanh(w^\top x + b), \qquad
        \hat u = u + \big(m(w^\top u) - w^\top u\big) \frac{w}{\|w\|^2}, \qquad
        \log|\det| = \log\big(1 + \tanh'(w^\top x + b)\, w^\top \hat u\big)

    The constraint :math:`w^\top \hat u > -1`, under which the step is invertible, holds by
    :math:`m(a) = \mathrm{softplus}(a + \log(e - 1)) - 1`, moved against the paper's so that
    m(0) = 0 and u = 0 is the identity.

    Args:
        dim: D, the number of coordinates.
        context: width C of the context; 0 for none.
        spread: standard deviation of the first coefficients around a random unit w and b = 0;
            0 starts at the identity.

    Example:
        >>> y, log_det = Planar(3, spread=0.0).push(torch.ones(5, 3))
        >>> bool((y == 1).all()), bool((log_det == 0).all())
        (True, True)

    Reference:
        Rezende and Mohamed, Variational inference with normalizing flows (2015), Eq. 10-12 and
        appendix A.1.
    """

    def __init__(self, dim: int, *, context: int = 0, spread: float = 0.01) -> None:
        super().__init__(dim, context)
        self.coefficients = Coefficients(2 * dim + 1, context, spread)
        with torch.no_grad():
            self.coefficients.bias[:dim] += normalize(torch.randn(dim), dim=0)

    def _push(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        w, u, b = self.coefficients(context).split([self.dim, self.dim, 1], -1)
        along = (w * u).sum(-1, keepdim=True)
        slope = _above_minus_one(along)
        tiny = torch.finfo(w.dtype).tiny
        u = u + (slope - along) * w / w.square().sum(-1, keepdim=True).clamp(min=tiny)
        bent = ((w * x).sum(-1, keepdim=True) + b).tanh()
        return x + u * bent, ((1 - bent.square()) * slope).log1p().squeeze(-1)


class Radial(ForwardOnly):
    r"""A radial step: it stretches and squeezes around one point.

    .. math:: y = x + \beta h\, (x - x_0), \qquad h = \frac{1}{\alpha + r}, \quad
        r = \|x - x_0\|, \qquad
        \log|\det| = (D - 1) \log(1 + \beta h) + \log(1 + \beta h - \beta r h^2)

    With :math:`\alpha = e^{a}` and :math:`\beta = \alpha\, m(\beta')`, m as for `Planar`, beta is
    above -alpha, which makes the step invertible, and 0 is the identity.

    Args:
        dim: D, the number of coordinates.
        context: width C of the context; 0 for none.
        spread: standard deviation of the first coefficients; 0 starts at the identity.

    Example:
        >>> y, log_det = Radial(3, spread=0.0).push(torch.ones(5, 3))
        >>> bool((y == 1).all()), bool((log_det == 0).all())
        (True, True)

    Reference:
        Rezende and Mohamed, Variational inference with normalizing flows (2015), Eq. 14 and
        appendix A.2.
    """

    def __init__(self, dim: int, *, context: int = 0, spread: float = 0.01) -> None:
        super().__init__(dim, context)
        self.coefficients = Coefficients(dim + 2, context, spread)

    def _push(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        centre, log_alpha, raw = self.coefficients(context).split([self.dim, 1, 1], -1)
        alpha = log_alpha.exp()
        beta = alpha * _above_minus_one(raw)
        away = x - centre
        r = torch.linalg.vector_norm(away, dim=-1, keepdim=True)
        share = beta / (alpha + r)
        log_det = (self.dim - 1) * share.log1p() + (share * alpha / (alpha + r)).log1p()
        return x + share * away, log_det.squeeze(-1)


def _above_minus_one(raw: Tensor) -> Tensor:
    """Map all numbers to those above -1, and 0 to 0."""
    return softplus(raw + UNITY) - 1


# Flows of these steps


def planar(dim: int, steps: int = 16, *, context: int = 0, spread: float = 0.01) -> Flow:
    """Build a chain of planar steps; it has no inverse in closed form.

    Args:
        dim: D, the number of coordinates.
        steps: their number.
        context: width C of a context on which the flow depends; 0 for none.
        spread: standard deviation of the first coefficients; 0 starts at the identity.

    Raises:
        ValueError: if there is no step.

    Example:
        >>> planar(2, steps=2)
        Flow('planar', dim=2: Planar, Planar)
    """
    return _chain("planar", Planar, dim, steps, context=context, spread=spread)


def radial(dim: int, steps: int = 16, *, context: int = 0, spread: float = 0.01) -> Flow:
    """Build a chain of radial steps; arguments and errors are those of `planar`.

    Example:
        >>> radial(2, steps=2)
        Flow('radial', dim=2: Radial, Radial)
    """
    return _chain("radial", Radial, dim, steps, context=context, spread=spread)


def _chain(name: str, kind: Callable[..., Step], dim: int, steps: int, **shared: Any) -> Flow:
    if steps < 1:
        raise ValueError(f"flows.{name}: steps is {steps}; give one or more.")
    return Flow([kind(dim, **shared) for _ in range(steps)], name=name)
