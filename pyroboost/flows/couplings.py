"""Coupling steps: some coordinates stay and say how the others move."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyroboost.flows._splines import size_of_spline, spline
from pyroboost.flows.elementwise import check_spline
from pyroboost.flows.step import Step

__all__ = ["AdditiveCoupling", "AffineCoupling", "Coupling", "SplineCoupling", "Split"]

Split = tuple[int, ...]


def halves(dim: int) -> Split:
    """Return the first half of the coordinates, the smaller one of an odd number."""
    return tuple(range(dim // 2))


def odds(dim: int) -> Split:
    """Return every second coordinate: 1, 3, 5, ..."""
    return tuple(range(1, dim, 2))


def _joined(split: tuple[Split, Split], second: int) -> Split:
    """Return the coordinates that stay and those that move one after the other, or vice versa."""
    return (*split[second], *split[1 - second])


class Layers(Protocol):
    """The layers of a network: modules, or functions that do the same for many at once."""

    inner: Any
    outer: Any
    context: Any


def dense(x: Tensor, context: Tensor | None, layers: Layers) -> Tensor:
    """Run a dense network with hyperbolic tangents, whose first layer adds the context's."""
    for i, layer in enumerate(layers.inner):
        x = layer(x)
        if i == 0 and layers.context is not None:
            x = x + layers.context(context)
        x = x.tanh()
    return layers.outer(x)


class Conditioner(nn.Module):
    """A dense network with hyperbolic tangents; a context enters its first layer.

    The context is multiplied once per row and not once per sample of that row. The last layer
    starts with weights of size `spread`.
    """

    def __init__(
        self, size: int, context: int, units: Sequence[int], out: int, spread: float
    ) -> None:
        super().__init__()
        widths = [size, *units]
        self.inner = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, units, strict=False))
        self.outer = nn.Linear(widths[-1], out)
        self.context = nn.Linear(context, units[0], bias=False) if context else None
        with torch.no_grad():
            self.outer.weight.normal_(0.0, spread / math.sqrt(widths[-1]))
            self.outer.bias.normal_(0.0, spread)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the numbers for each row."""
        return dense(x, context, self)


class Coupling(Step):
    r"""The coordinates in `kept` stay and a network of them says how the others move.

    .. math:: y_K = x_K, \qquad y_M = h(x_M; \theta(x_K, c))

    Subclasses say h. One coupling leaves `kept` where it is: alternate `kept` (as the
    factories do), or nothing is learnt about some coordinates.

    Args:
        dim: D, the number of coordinates, two or more.
        kept: the coordinates that stay; the first half by default.
        context: width C of a context, which the network sees too; 0 for none.
        units: widths of the network's hidden layers, or of its only one.
        spread: size of the network's first outputs; 0 starts at the identity.

    Raises:
        ValueError: if there are fewer than two coordinates, or none stays, or none moves.
    """

    smallest = 2
    numbers = 1  # how many numbers move one coordinate
    order: Tensor
    restore: Tensor

    def __init__(
        self,
        dim: int,
        *,
        kept: Sequence[int] | None = None,
        context: int = 0,
        units: int | Sequence[int] = 64,
        spread: float = 0.01,
    ) -> None:
        super().__init__(dim, context)
        name = type(self).__name__
        kept = halves(dim) if kept is None else tuple(kept)
        moved = [i for i in range(dim) if i not in kept]
        if len(set(kept)) != len(kept) or len(kept) + len(moved) != dim or not kept or not moved:
            raise ValueError(
                f"{name}: kept is {tuple(kept)}; give different coordinates of 0 to {dim - 1}, at "
                "least one and not all."
            )
        units = (units,) if isinstance(units, int) else tuple(units)
        if not units or min(units) < 1:
            raise ValueError(f"{name}: units is {units}; give the widths of the hidden layers.")
        self.split = kept, tuple(moved)
        self.sizes = len(kept), len(moved)
        # Where the two parts are two blocks, in which order; they are cut and joined at less cost.
        self.blocks = next((b for b in (0, 1) if _joined(self.split, b) == (*range(dim),)), None)
        order = torch.tensor([*kept, *moved])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("restore", order.argsort(), persistent=False)
        self.net = Conditioner(len(kept), context, units, len(moved) * self.numbers, spread)

    def _move(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor | None]:
        """Return the moved coordinates and the logs of their derivatives; None: all zero."""
        raise NotImplementedError

    def _map(
        self, x: Tensor, network: Callable[[Tensor], Tensor], inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Return images and log-determinants; leading dimensions are the network's affair."""
        kept, moved = self._cut(x)
        raw = network(kept)
        raw = raw.reshape(*raw.shape[:-1], self.sizes[1], self.numbers)
        moved, log_slope = self._move(moved, raw, inverse)
        log_det = x.new_zeros(x.shape[:-1]) if log_slope is None else log_slope.sum(-1)
        return self._join(kept, moved), log_det

    def _cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what stays and what moves."""
        if self.blocks is None:
            kept, moved = x.index_select(-1, self.order).split_with_sizes(self.sizes, -1)
        elif self.blocks == 0:
            kept, moved = x.split_with_sizes(self.sizes, -1)
        else:
            moved, kept = x.split_with_sizes(self.sizes[::-1], -1)
        return kept, moved

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        """Put every coordinate back in its place."""
        joined = torch.cat([moved, kept] if self.blocks else [kept, moved], -1)
        return joined.index_select(-1, self.restore) if self.blocks is None else joined

    def _push(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(x, partial(self.net, context=context), inverse=False)

    def _pull(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._map(y, partial(self.net, context=context), inverse=True)


class AdditiveCoupling(Coupling):
    r"""The coupling of NICE, :math:`y_M = x_M + t(x_K, c)`; its log-determinant is 0.

    Arguments and errors are those of `Coupling`.

    Example:
        >>> y, log_det = AdditiveCoupling(3, spread=1.0).push(torch.zeros(5, 3))
        >>> y.shape, bool((y[:, 0] == 0).all()), bool((log_det == 0).all())
        (torch.Size([5, 3]), True, True)

    Reference:
        Dinh et al., NICE (2015), section 3.2.
    """

    def _move(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, None]:
        shift = raw.squeeze(-1)
        return (x - shift if inverse else x + shift), None


class AffineCoupling(Coupling):
    r"""The coupling of RealNVP.

    .. math:: y_M = t(x_K, c) + e^{s(x_K, c)} x_M, \qquad s = \beta \tanh(s' / \beta)

    The log scale is bounded by beta = `limit` smoothly, so that its gradient is its own; Pyro's
    clips the value and lets the gradient pass, which is the gradient of another function.

    Other arguments and errors are those of `Coupling`.

    Example:
        >>> y, log_det = AffineCoupling(3, kept=[1], spread=1.0).push(torch.ones(5, 3))
        >>> y.shape, bool((y[:, 1] == 1).all()), log_det.shape
        (torch.Size([5, 3]), True, torch.Size([5]))

    Reference:
        Dinh et al., Density estimation using Real NVP (2017), Eq. 4-8.
    """

    numbers = 2

    def __init__(
        self,
        dim: int,
        *,
        kept: Sequence[int] | None = None,
        context: int = 0,
        units: int | Sequence[int] = 64,
        spread: float = 0.01,
        limit: float = 3.0,
    ) -> None:
        super().__init__(dim, kept=kept, context=context, units=units, spread=spread)
        if not 0 < limit < math.inf:
            raise ValueError(f"AffineCoupling: limit is {limit}; give the largest log scale.")
        self.limit = limit

    def _move(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, log_scale = raw.unbind(-1)
        log_scale = self.limit * (log_scale / self.limit).tanh()
        if inverse:
            return (x - shift) * (-log_scale).exp(), -log_scale
        return shift + log_scale.exp() * x, log_scale


class SplineCoupling(Coupling):
    r"""A neural spline coupling: a rational-quadratic spline for every moved coordinate.

    What stays is not moved by a spline of its own, and outside [-bound, bound] the step is the
    identity, so add an affine step where the box may be in the wrong place (`flows.spline` does).

    Args:
        bins: K, the number of bins.
        bound: half the box's width, in the units of the points.
        dim, kept, context, units, spread: as for `Coupling`.

    Example:
        >>> step = SplineCoupling(4, bins=4, spread=1.0).double()
        >>> x = torch.randn(100, 4, dtype=torch.float64)
        >>> bool(torch.isclose(step.inv(step(x)), x, atol=1e-10).all())
        True

    Reference:
        Durkan et al., Neural spline flows (2019), section 3.2.
    """

    def __init__(
        self,
        dim: int,
        *,
        kept: Sequence[int] | None = None,
        context: int = 0,
        units: int | Sequence[int] = 64,
        bins: int = 8,
        bound: float = 4.0,
        spread: float = 0.01,
    ) -> None:
        check_spline(type(self).__name__, bins, bound)
        self.numbers = size_of_spline(bins)
        super().__init__(dim, kept=kept, context=context, units=units, spread=spread)
        self.bins, self.bound = bins, bound

    def _move(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return spline(x, raw, self.bound, inverse=inverse)
