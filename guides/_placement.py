"""Where a component stands: whitened coordinates, and a normal law within them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pyroboost import flows
from pyroboost.flows import Affine, Flow, LowerTriangular, Step, check_invertible

__all__ = ["Factory", "Whitening", "build", "factories", "place"]

Factory = Callable[[int], Flow]
_NAMED: dict[str, Factory] = {
    name: getattr(flows, name)
    for name in ("affine", "householder", "lower", "lu", "nice", "nlsq", "realnvp", "spline")
}
_COUPLINGS = ("householder", "nice", "realnvp")  # these need two coordinates


class Whitening(Step):
    r"""A fixed change of coordinates: a normal law, stretched along a few directions.

    .. math:: u = m + s \odot \big(y + W ((\lambda - 1) \odot W^\top y)\big), \qquad W^\top W = I

    On a standard normal y the covariance of u is :math:`S (I + W (\lambda^2 - 1) W^\top) S`: full
    with D directions, low rank plus diagonal with fewer, diagonal with none. Everything is a
    buffer: it is the frame in which flows are trained.

    Args:
        dim: D, the number of coordinates.
        rank: r, the number of directions.

    Example:
        >>> step = Whitening(3, 2)
        >>> y, log_det = step.push(torch.ones(5, 3))
        >>> y.shape, bool((y == 1).all()), bool((log_det == 0).all())
        (torch.Size([5, 3]), True, True)
    """

    loc: Tensor  # (D)
    scale: Tensor  # (D)
    basis: Tensor  # (D, r)
    stretch: Tensor  # (r)

    def __init__(self, dim: int, rank: int = 0) -> None:
        super().__init__(dim)
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("basis", torch.eye(dim)[:, :rank].contiguous())
        self.register_buffer("stretch", torch.ones(rank))

    @classmethod
    def of(cls, loc: Tensor, scale: Tensor, basis: Tensor, stretch: Tensor) -> Whitening:
        """Return the one with these numbers."""
        new = cls(len(loc), len(stretch)).to(loc)
        new.loc, new.scale, new.basis, new.stretch = loc, scale, basis, stretch
        return new

    def take(self, other: Whitening) -> None:
        """Take over the numbers of another one of the same dimension, whatever its rank."""
        for name, value in other.named_buffers():
            setattr(self, name, value.detach().clone().to(self.loc))

    @property
    def log_volume(self) -> Tensor:
        """Log |det du/dy|."""
        return self.scale.log().sum() + self.stretch.log().sum()

    def _push(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x + ((x @ self.basis) * (self.stretch - 1)) @ self.basis.mT
        return self.loc + self.scale * x, self.log_volume.expand(x.shape[:-1])

    def _pull(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y = (y - self.loc) / self.scale
        y = y + ((y @ self.basis) * (1 / self.stretch - 1)) @ self.basis.mT
        return y, -self.log_volume.expand(y.shape[:-1])

    # As a normal law

    def draw(self, count: int) -> Tensor:
        """Draw points (S, D) of the normal law."""
        return self.push(torch.randn(count, self.dim).to(self.loc))[0]

    def log_prob(self, points: Tensor) -> Tensor:
        """Return log densities in nats, (S), of points (S, D)."""
        y, log_det = self.pull(points)
        return -0.5 * (y.square() + math.log(2 * math.pi)).sum(-1) + log_det


def factories(flow: str | Factory | Sequence[str | Factory], count: int | None) -> list[Factory]:
    """Return one function of the dimension for every component.

    Raises:
        TypeError: something is neither a name nor a function.
        ValueError: a name is not known, or a list has another length than asked for.
    """
    listed: list[str | Factory] = []
    if isinstance(flow, str) or callable(flow):
        listed = [flow] * (4 if count is None else count)
    else:
        listed = list(flow)
    if not listed or count not in (None, len(listed)):
        raise ValueError(
            f"AutoBoostedFlow: {len(listed)} flows came for components={count}; give one or more "
            "components, and one flow for all of them or one for each."
        )
    return [_factory(one) for one in listed]


def _factory(flow: str | Factory) -> Factory:
    if isinstance(flow, str):
        if flow not in _NAMED:
            raise ValueError(
                f"AutoBoostedFlow: flow is {flow!r}; give one of {', '.join(_NAMED)}, or a "
                "function of the dimension that returns a flow."
            )
        return partial(_named, flow)
    if not callable(flow):
        raise TypeError(
            f"AutoBoostedFlow: flow is {type(flow).__name__}; give a name, or a function of the "
            "dimension that returns a pyroboost.flows.Flow."
        )
    return flow


def _named(name: str, dim: int) -> Flow:
    """Build a flow by name; in one dimension, where couplings have nothing to do, a spline."""
    return _NAMED["spline" if dim == 1 and name in _COUPLINGS else name](dim)


def build(make: Factory, whitening: Whitening, full: int, allow_slow: bool = False) -> Flow:
    """Build a component: a new flow, then a trainable normal map, then the shared whitening.

    Args:
        make: builds the flow for a dimension.
        whitening: the frame, which components share.
        full: the largest D for which the normal map is triangular, not diagonal.
        allow_slow: accept autoregressive flows.
    """
    dim = whitening.dim
    flow = make(dim)
    if not isinstance(flow, Flow):
        raise TypeError(
            f"AutoBoostedFlow: the function for flows built {type(flow).__name__}; let it return "
            "a pyroboost.flows.Flow."
        )
    check_invertible(flow, allow_slow=allow_slow, where="AutoBoostedFlow")
    if flow.context:
        raise ValueError(
            f"AutoBoostedFlow: flow '{flow.name}' depends on a context of width {flow.context}, "
            "which a posterior does not have; build it without one."
        )
    if flow.dim != dim:
        raise ValueError(
            f"AutoBoostedFlow: flow '{flow.name}' has {flow.dim} dimensions and the model {dim}; "
            "build it for the dimension that the function is given."
        )
    like = next(flow.parameters(), whitening.loc)
    step = LowerTriangular(dim, spread=0.0) if dim <= full else Affine(dim, spread=0.0)
    return Flow([flow, step.to(like), whitening], name=flow.name)


@torch.no_grad()
def place(flow: Flow, start: Whitening) -> None:
    """Let a component start as a normal law, up to what its flow is away from the identity.

    Args:
        flow: what `build` returned.
        start: the law, in unconstrained coordinates.
    """
    step, frame = flow.steps[-2], flow.steps[-1]
    wide = Whitening.of(*(b.to(start.loc) for _, b in frame.named_buffers()))
    shift = wide.pull(start.loc)[0]
    columns = wide.pull(start.push(torch.eye(start.dim).to(start.loc))[0])[0] - shift
    if isinstance(step, Affine):
        numbers = torch.cat([shift, columns.square().sum(0).sqrt().log()])
    else:
        lower = torch.linalg.cholesky(columns.mT @ columns)
        rows, cols = torch.tril_indices(start.dim, start.dim, -1)
        numbers = torch.cat([shift, lower.diagonal().log(), lower[rows, cols]])
    step.coefficients.bias.copy_(numbers)
