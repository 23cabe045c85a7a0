"""Paths uphill on a log density, with a normal law at every point that is passed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from pyroboost.guides._placement import Whitening
from pyroboost.guides._target import Target

__all__ = ["newton", "pulled", "quasi_newton", "with_precision"]

_STEPS = 60
_HALVINGS = 24
_MEMORY = 8
_REFRESH = 15


def newton(target: Target, x: Tensor) -> list[Whitening]:
    """Climb by Newton steps with absolute eigenvalues; return the laws at the points passed."""
    path: list[Whitening] = []
    value, slope = (part[0] for part in target.gradient(x[None]))
    for _ in range(_STEPS):
        law = _laplace(target, x)
        if law is None or not bool(value.isfinite()):
            break
        path.append(law)
        y = pulled(law, slope)
        if float(y.square().sum()) < _least(target, value):
            break
        moved = _search(target, x, law.push(y)[0] - x, value)
        if moved is None:
            break
        x = moved
        value, slope = (part[0] for part in target.gradient(x[None]))
    return path


def _least(target: Target, value: Tensor) -> float:
    """Return the gain of a step, in nats, below which a path has arrived."""
    return 1e-4 + 8 * torch.finfo(target.start.dtype).eps * abs(float(value))


def pulled(law: Whitening, slope: Tensor) -> Tensor:
    """Return a slope in the coordinates of a law: the transpose of the law's map."""
    y = slope * law.scale
    return y + law.basis @ ((law.stretch - 1) * (law.basis.mT @ y))


def _search(target: Target, x: Tensor, step: Tensor, value: Tensor) -> Tensor | None:
    """Return the best of the points at steps of 2, 1, 1/2, ..., if it is higher than x."""
    # The nearest eight first: nearly always one of them is higher.
    for first, last in ((-1, 7), (7, _HALVINGS)):
        sizes = 0.5 ** torch.arange(first, last, dtype=torch.float64)
        points = x + sizes[:, None] * step
        with torch.no_grad():
            values = target(points.to(target.start)).double()
        best = int(values.argmax())
        if values[best] > value:
            return points[best]
    return None


def _laplace(target: Target, x: Tensor) -> Whitening | None:
    """Return the normal law of the second derivatives at a point, made positive."""
    try:
        precision = -target.hessian(x[None])
    except (RuntimeError, ValueError):
        return None
    return with_precision(target, x, precision)


def with_precision(target: Target, x: Tensor, precision: Tensor) -> Whitening | None:
    """Return the normal law at a place with the absolute eigenvalues of a precision."""
    if not bool(precision.isfinite().all()):
        return None
    size = precision.diagonal().abs()
    # A coordinate without curvature of its own is measured by its row.
    size = torch.maximum(size, 1e-6 * precision.abs().amax(1)).clamp(min=1e-12)
    scale = size.rsqrt()
    values, basis = torch.linalg.eigh(scale[:, None] * precision * scale)
    least = 1e-6 if target.start.dtype == torch.float32 else 1e-12
    return Whitening.of(x, scale, basis, values.abs().clamp(min=least).rsqrt())


def quasi_newton(target: Target, x: Tensor) -> list[Whitening]:
    """Climb by limited-memory BFGS; return laws of low rank plus diagonal at the points passed.

    The diagonal is that of the second derivatives, taken anew every few steps.
    """
    path: list[Whitening] = []
    pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MEMORY)
    value, slope = (part[0] for part in target.gradient(x[None]))
    for step in range(4 * _STEPS):
        if not bool(value.isfinite()) or not bool(slope.isfinite().all()):
            break
        if step % _REFRESH == 0:
            alpha = _diagonal(target, x)
        path.append(_low_rank(x, alpha, pairs))
        uphill = _apply(alpha, pairs, slope[:, None])[:, 0]
        if float(uphill @ slope) < _least(target, value):
            break
        moved = _search(target, x, uphill, value)
        if moved is None:
            if not pairs:
                break
            pairs.clear()
            continue
        value, new = (part[0] for part in target.gradient(moved[None]))
        s, y = moved - x, slope - new
        if float(s @ y) > 1e-10 * float(s.norm() * y.norm()):
            pairs.append((s, y))
        x, slope = moved, new
    return path


def _diagonal(target: Target, x: Tensor) -> Tensor:
    """Return a diagonal inverse Hessian at a point, made positive."""
    try:
        size = target.curvature(x).abs().nan_to_num(nan=1.0, posinf=1.0)
    except (RuntimeError, ValueError):
        size = torch.ones_like(x)
    return size.clamp(min=max(1e-12, 1e-3 * float(size.median()))).reciprocal()


Pairs = Sequence[tuple[Tensor, Tensor]]


def _apply(alpha: Tensor, pairs: Pairs, v: Tensor) -> Tensor:
    """Multiply columns (D, n) by the inverse Hessian of limited-memory BFGS."""
    kept = []
    for s, y in reversed(pairs):
        a = (s @ v) / (s @ y)
        v = v - y[:, None] * a
        kept.append(a)
    v = alpha[:, None] * v
    for (s, y), a in zip(pairs, reversed(kept), strict=True):
        v = v + s[:, None] * (a - (y @ v) / (s @ y))
    return v


def _low_rank(x: Tensor, alpha: Tensor, pairs: Pairs) -> Whitening:
    """Return the law whose covariance is the inverse Hessian, which is diagonal but for a span."""
    scale = alpha.sqrt()
    if not pairs:
        return Whitening.of(x, scale, x.new_zeros(len(x), 0), x.new_ones(0))
    span = torch.stack([v for s, y in pairs for v in (s / scale, y * scale)], 1)
    frame = torch.linalg.qr(span / span.norm(dim=0))[0]
    inner = frame.mT @ (_apply(alpha, pairs, frame / scale[:, None]) / scale[:, None])
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    return Whitening.of(x, scale, frame @ vectors, values.clamp(min=1e-12).sqrt())
