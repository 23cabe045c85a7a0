"""Sylvester steps: many planar ones at once, in orthogonal directions."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyroboost.flows.flow import Flow
from pyroboost.flows.forward_only import ForwardOnly
from pyroboost.flows.linear import times
from pyroboost.flows.step import Coefficients

__all__ = ["Sylvester", "sylvester"]

Kind = Literal["orthogonal", "householder", "triangular"]
MOST = 100  # passes after which vectors that are still not orthonormal never will be


class Sylvester(ForwardOnly):
    r"""A Sylvester step: M planar steps at once, in orthogonal directions.

    .. math:: y = x + Q R_1 \tanh(R_2 Q^\top x + b), \qquad
        \log|\det| = \textstyle\sum_m \log\big(1 + \tanh'_m\, (R_1)_{mm} (R_2)_{mm}\big)

    :math:`R_1, R_2` are upper triangular with diagonals in (-1, 1), so that the step is
    invertible, and Q has M orthonormal columns:

    1. ``"orthogonal"``: a free matrix A of norm at most 1, to which
       :math:`A \leftarrow A (I + \tfrac12 (I - A^\top A))` is applied until
       :math:`A^\top A` is the identity to rounding, with gradients passed through.
    2. ``"householder"``: M = D, a product of reflections.
    3. ``"triangular"``: M = D, the identity or, where `flip`, the order of coordinates reversed.

    Args:
        dim: D, the number of coordinates.
        kind: what Q is.
        vectors: M for ``"orthogonal"``, at most D; the reflections of ``"householder"``.
        flip: whether ``"triangular"`` reverses the coordinates.
        context: width C of the context; 0 for none.
        spread: standard deviation of the first coefficients; 0 starts at the identity.

    Raises:
        ValueError: if the kind or the number of vectors is impossible, or if the vectors have
            become dependent.

    Example:
        >>> step = Sylvester(5, "orthogonal", vectors=2, spread=1.0)
        >>> q = step.directions()
        >>> q.shape, bool(torch.isclose(q.mT @ q, torch.eye(2), atol=1e-5).all())
        (torch.Size([5, 2]), True)

    Reference:
        van den Berg et al., Sylvester normalizing flows for variational inference (2018),
        Eq. 8-15.
    """

    flipped: Tensor

    def __init__(
        self,
        dim: int,
        kind: Kind = "orthogonal",
        *,
        vectors: int = 8,
        flip: bool = False,
        context: int = 0,
        spread: float = 0.01,
    ) -> None:
        super().__init__(dim, context)
        if kind not in get_args(Kind):
            raise ValueError(
                f"Sylvester: kind is {kind!r}; give one of {', '.join(get_args(Kind))}."
            )
        if vectors < 1 or (kind == "orthogonal" and vectors > dim):
            raise ValueError(
                f"Sylvester: vectors is {vectors} in {dim} dimensions; give at least 1 and, for "
                "'orthogonal', at most the dimension."
            )
        self.kind, self.vectors = kind, vectors
        self.width = vectors if kind == "orthogonal" else dim
        self.sizes = [self.width**2, 3 * self.width, 0 if kind == "triangular" else dim * vectors]
        self.coefficients = Coefficients(sum(self.sizes), context, spread)
        order = torch.arange(dim)
        self.register_buffer("flipped", order.flip(0) if flip else order, persistent=False)
        with torch.no_grad():
            self._start(self.coefficients.bias)

    def _start(self, bias: Tensor) -> None:
        """Put R_2 near a diagonal, else its gradient and that of R_1 wait for each other."""
        bias[self.sizes[0] + self.width : self.sizes[0] + 2 * self.width] += 1.0
        if self.kind != "triangular":
            raw = torch.randn(self.dim, self.vectors)
            start = torch.linalg.qr(raw)[0] if self.kind == "orthogonal" else normalize(raw, dim=0)
            bias[-self.sizes[2] :] += start.flatten()

    def directions(self, context: Tensor | None = None) -> Tensor:
        """Return Q, of shape (*B, D, M)."""
        return self._directions(self.coefficients(context).split(self.sizes, -1)[2])

    def _directions(self, raw: Tensor) -> Tensor:
        if self.kind == "triangular":
            return torch.eye(self.dim, dtype=raw.dtype, device=raw.device)[self.flipped]
        raw = raw.reshape(*raw.shape[:-1], self.dim, self.vectors)
        if self.kind == "orthogonal":
            return orthonormal(raw)
        q = torch.eye(self.dim, dtype=raw.dtype, device=raw.device)
        for v in normalize(raw, dim=-2).unbind(-1):
            q = q - 2 * (q @ v.unsqueeze(-1)) * v.unsqueeze(-2)
        return q

    def _push(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        square, rest, raw = self.coefficients(context).split(self.sizes, -1)
        first, second, shift = rest.chunk(3, -1)
        first, second = first.tanh(), second.tanh()
        above, below = _halves(square, self.width)
        q = self._directions(raw)
        inner = times(below.mT + second.diag_embed(), times(q.mT, x)) + shift
        bent = inner.tanh()
        moved = times(q, times(above + first.diag_embed(), bent))
        return x + moved, ((1 - bent.square()) * first * second).log1p().sum(-1)


def _halves(square: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the parts strictly above and strictly below the diagonal of square matrices."""
    matrix = square.reshape(*square.shape[:-1], width, width)
    return matrix.triu(1), matrix.tril(-1)


def orthonormal(raw: Tensor) -> Tensor:
    r"""Make the columns of matrices orthonormal to rounding, with gradients passed through.

    Args:
        raw: matrices of full column rank.  # (*B, D, M)

    Raises:
        ValueError: if their columns are dependent.
    """
    width = raw.shape[-1]
    eye = torch.eye(width, dtype=raw.dtype, device=raw.device)
    near = 4 * width * torch.finfo(raw.dtype).eps
    a = raw / torch.linalg.matrix_norm(raw, keepdim=True)
    for _ in range(MOST):
        off = eye - a.mT @ a
        if float(off.detach().abs().max()) <= near:
            return a
        a = a + 0.5 * a @ off
    raise ValueError(
        "Sylvester: its vectors are not orthonormal after 100 passes, because they have become "
        "linearly dependent or are not finite; use fewer vectors or a smaller learning rate."
    )


def sylvester(
    dim: int,
    steps: int = 16,
    kind: Kind = "orthogonal",
    *,
    vectors: int = 8,
    context: int = 0,
    spread: float = 0.01,
) -> Flow:
    """Build a chain of Sylvester steps; every second triangular one reverses the coordinates.

    Args:
        dim: D, the number of coordinates.
        steps: their number.
        kind: ``"orthogonal"``, ``"householder"`` or ``"triangular"``.
        vectors: the orthonormal vectors, at most D, or the reflections of one step.
        context: width C of a context on which the flow depends; 0 for none.
        spread: standard deviation of the first coefficients; 0 starts at the identity.

    Raises:
        ValueError: if there is no step, or as `Sylvester`.

    Example:
        >>> sylvester(3, steps=1, kind="triangular")
        Flow('sylvester', dim=3: Sylvester)
    """
    if steps < 1:
        raise ValueError(f"flows.sylvester: steps is {steps}; give one or more.")
    listed = [
        Sylvester(dim, kind, vectors=vectors, flip=bool(k % 2), context=context, spread=spread)
        for k in range(steps)
    ]
    return Flow(listed, name="sylvester")
