"""What every flow step is: a map of vectors that can be run both ways."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn
from torch.distributions import Transform, constraints

__all__ = ["CoefficientStep", "Coefficients", "Step"]


class Coefficients(nn.Module):
    r"""The numbers a step needs: free parameters, or an affine function of a context.

    .. math:: \theta(c) = \theta_0 + W c

    They start as independent normal numbers of standard deviation `spread` (times the size of a
    context of unit variance), so that a spread of 0 starts every step at theta = 0, which each
    step makes its identity.

    Args:
        size: how many numbers.
        context: width C of the context; 0 for none.
        spread: standard deviation of the first values.
    """

    def __init__(self, size: int, context: int = 0, spread: float = 0.01) -> None:
        super().__init__()
        self.bias = nn.Parameter(spread * torch.randn(size))
        self.weight = None
        if context:
            weight = torch.randn(size, context) / math.sqrt(context)
            self.weight = nn.Parameter(spread * weight)

    def forward(self, context: Tensor | None = None) -> Tensor:
        """Return the numbers, (size) or one set for every row of the context, (*B, size)."""
        if self.weight is None:
            return self.bias
        return nn.functional.linear(context, self.weight, self.bias)  # type: ignore[arg-type]


class Step(TransformModule):
    r"""One step :math:`y = f(x)` of a flow on vectors, invertible in closed form.

    A step is a Pyro `TransformModule`. With a context it is amortised: its coefficients are
    functions of a context c, and `condition(c)` returns the transform for that context. It
    stores nothing of what passes through it, so it can be deep-copied at any time, which Pyro's
    own learnable transforms cannot once they have been called.

    Subclasses say `_push` and `_pull`; both return a log-determinant, so that neither
    direction ever needs the other.

    Args:
        dim: D, the number of coordinates.
        context: width C of the context; 0 for a step that has none.

    Raises:
        ValueError: if the dimension or the context's width is impossible.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    smallest = 1  # the least dimension that this step can move
    slow = False

    def __init__(self, dim: int, context: int = 0) -> None:
        super().__init__()
        name = type(self).__name__
        if context < 0:
            raise ValueError(f"{name}: context is {context}; give the context's width, or 0.")
        if dim < self.smallest:
            raise ValueError(
                f"{name}: dim is {dim}, and this step needs at least {self.smallest}; for one "
                "dimension use flows.spline, flows.nlsq or flows.affine."
            )
        self.dim, self.context = dim, context

    @property
    def label(self) -> str:
        """What messages call the step."""
        return type(self).__name__

    @property
    def refusal(self) -> str | None:
        """Why this step cannot be inverted, if so."""
        return "defines no _pull" if type(self)._pull is Step._pull else None

    def push(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Run the step forwards.

        Args:
            x: points.  # (*S, D)
            context: one context for each row, or for each of a shape that broadcasts with *S;
                a step without a context ignores it.  # (*B, C)

        Returns:
            y = f(x), and log |det dy/dx|.  # (*S, D), (*S)
        """
        return self._push(*self._fit("push", x, context))

    def pull(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the step backwards: return x with f(x) = y, and log |det dx/dy|."""
        return self._pull(*self._fit("pull", y, context))

    def condition(self, context: Tensor) -> Transform:
        """Return the transform that this step is for a given context (*B, C)."""
        return Conditioned(self, context)

    def _push(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _pull(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _fit(self, method: str, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Check shapes and give points and contexts a common batch shape."""
        where = f"{type(self).__name__}.{method}"
        if x.shape[-1:] != (self.dim,):
            raise ValueError(
                f"{where}: points have shape {tuple(x.shape)}; their last dimension must be "
                f"{self.dim}."
            )
        if not self.context:
            return x, None
        return fit_context(where, x, context, self.context)

    # The interface of torch's transforms, for a step without a context

    def _call(self, x: Tensor) -> Tensor:
        return self.push(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.pull(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log |det dy/dx| at x."""
        return self.push(x)[1]

    def __repr__(self) -> str:
        context = f", context={self.context}" if self.context else ""
        return f"{type(self).__name__}({self.dim}{context})"


class CoefficientStep(Step):
    r"""A step whose map is said as a function of points and of `Coefficients`, for one or many.

    Subclasses say `_map`. It works on the last dimension, and leading dimensions of points and
    coefficients broadcast, so that the coefficients of C steps move points (C, *S, D) at once.
    """

    coefficients: Coefficients

    def _map(self, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Return the images of points (*S, D) and the log-determinants (*S)."""
        raise NotImplementedError

    def _push(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(x, self.coefficients(context), inverse=False)

    def _pull(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(y, self.coefficients(context), inverse=True)


def fit_context(where: str, x: Tensor, context: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """Refuse a context that does not fit, and expand points to the rows of one that does."""
    if context is None:
        raise ValueError(
            f"{where}: this flow is amortised and needs a context; pass one of shape "
            f"(..., {width}), or use condition(context)."
        )
    try:
        fits = context.shape[-1:] == (width,)
        shape = np.broadcast_shapes(x.shape[:-1], context.shape[:-1])
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{where}: the context has shape {tuple(context.shape)} for points of shape "
            f"{tuple(x.shape)}; give (..., {width}), with batch dimensions that broadcast."
        )
    return (x if x.shape[:-1] == shape else x.expand(*shape, x.shape[-1])), context


class Conditioned(Transform):
    """An amortised step at one context: a plain transform, which caches nothing."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, step: Any, context: Tensor | None) -> None:
        super().__init__()
        self.step, self.context = step, context

    def _call(self, x: Tensor) -> Tensor:
        return self.step.push(x, self.context)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.step.pull(y, self.context)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log |det dy/dx| at x."""
        return self.step.push(x, self.context)[1]

    def __repr__(self) -> str:
        return f"{self.step!r}.condition(...)"
