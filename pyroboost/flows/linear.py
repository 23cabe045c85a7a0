"""Linear steps: triangular and LU matrices, reflections, permutations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroboost.flows.step import Coefficients, CoefficientStep, Step

__all__ = ["LU", "Householder", "LowerTriangular", "Permutation"]


class LowerTriangular(CoefficientStep):
    r"""A lower triangular matrix with a positive diagonal, and a shift.

    .. math:: y = L x + a, \qquad L_{ii} = e^{s_i}, \qquad \log|\det| = \textstyle\sum_i s_i

    On a standard normal base it is any normal law with a full covariance.

    Args:
        dim: D, the number of coordinates.
        context: width C of the context; 0 for none.
        spread: standard deviation of the first coefficients; 0 starts at the identity.

    Example:
        >>> step = LowerTriangular(3, spread=0.0)
        >>> torch.equal(step.matrix(), torch.eye(3))
        True

    Reference:
        Tomczak and Welling, Improving variational auto-encoders using convex combination linear
        inverse autoregressive flow (2017), section 3.
    """

    def __init__(self, dim: int, *, context: int = 0, spread: float = 0.01) -> None:
        super().__init__(dim, context)
        self.coefficients = Coefficients(2 * dim + dim * (dim - 1) // 2, context, spread)

    def _parts(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the shift, the log of the diagonal and the matrix."""
        d = self.dim
        shift, log_diagonal, below = numbers.split_with_sizes([d, d, d * (d - 1) // 2], -1)
        return shift, log_diagonal, strictly_lower(below, d) + log_diagonal.exp().diag_embed()

    def matrix(self, context: Tensor | None = None) -> Tensor:
        """Return L, of shape (*B, D, D)."""
        return self._parts(self.coefficients(context))[2]

    def _map(self, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, log_diagonal, matrix = self._parts(numbers)
        if inverse:
            return solve(matrix, x - shift), -log_diagonal.sum(-1).expand(x.shape[:-1])
        return times(matrix, x) + shift, log_diagonal.sum(-1).expand(x.shape[:-1])


class LU(CoefficientStep):
    r"""A matrix given by its LU factors, and a shift.

    .. math:: y = L U x + a, \qquad L_{ii} = 1, \quad U_{ii} = e^{s_i}, \qquad
        \log|\det| = \textstyle\sum_i s_i

    Both directions cost two triangular products or solves; nothing is factorised.

    Args:
        dim: D, the number of coordinates.
        context: width C of the context; 0 for none.
        spread: standard deviation of the first coefficients; 0 starts at the identity.

    Example:
        >>> step = LU(3, spread=0.0)
        >>> torch.equal(step.matrix(), torch.eye(3))
        True

    Reference:
        Kingma and Dhariwal, Glow (2018), section 3.2, without its permutation.
    """

    def __init__(self, dim: int, *, context: int = 0, spread: float = 0.01) -> None:
        super().__init__(dim, context)
        self.coefficients = Coefficients(2 * dim + dim * (dim - 1), context, spread)

    def _parts(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the shift, the log of the diagonal of U, and both factors."""
        d, half = self.dim, self.dim * (self.dim - 1) // 2
        shift, log_diagonal, below, above = numbers.split_with_sizes([d, d, half, half], -1)
        lower = strictly_lower(below, d) + torch.eye(d, dtype=shift.dtype, device=shift.device)
        upper = strictly_lower(above, d).mT + log_diagonal.exp().diag_embed()
        return shift, log_diagonal, lower, upper

    def matrix(self, context: Tensor | None = None) -> Tensor:
        """Return L U, of shape (*B, D, D)."""
        _, _, lower, upper = self._parts(self.coefficients(context))
        return lower @ upper

    def _map(self, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, log_diagonal, lower, upper = self._parts(numbers)
        log_det = log_diagonal.sum(-1).expand(x.shape[:-1])
        if inverse:
            return solve(upper, solve(lower, x - shift), upper=True), -log_det
        return times(lower, times(upper, x)) + shift, log_det


class Householder(CoefficientStep):
    r"""Pairs of reflections: a rotation.

    .. math:: y = H_{v_{2P}} \cdots H_{v_1} x, \qquad H_v x = x - 2 \frac{v v^\top}{\|v\|^2} x,
        \qquad \log|\det| = 0

    Reflections come in pairs because one of them cannot start near the identity: its
    determinant is -1. The two of a pair start near each other.

    Args:
        dim: D, the number of coordinates.
        pairs: P, the number of pairs.
        context: width C of the context; 0 for none.
        spread: distance of the first vectors of a pair; 0 starts at the identity.

    Raises:
        ValueError: if there is no pair.

    Example:
        >>> step = Householder(4, pairs=2, spread=1.0)
        >>> x = torch.randn(5, 4)
        >>> bool(torch.isclose(step(x).norm(dim=-1), x.norm(dim=-1), atol=1e-5).all())
        True

    Reference:
        Tomczak and Welling, Improving variational auto-encoders using Householder flow (2016),
        section 3.
    """

    smallest = 2

    def __init__(self, dim: int, *, pairs: int = 1, context: int = 0, spread: float = 0.01) -> None:
        super().__init__(dim, context)
        if pairs < 1:
            raise ValueError(f"Householder: pairs is {pairs}; give one or more.")
        self.pairs = pairs
        self.coefficients = Coefficients(2 * pairs * dim, context, spread)
        unit = torch.nn.functional.normalize(torch.randn(pairs, 1, dim), dim=-1)
        with torch.no_grad():
            self.coefficients.bias.add_(unit.expand(-1, 2, -1).flatten())

    def _map(self, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raw = numbers.reshape(*numbers.shape[:-1], 2 * self.pairs, self.dim)
        vectors = (raw / torch.linalg.vector_norm(raw, dim=-1, keepdim=True)).unbind(-2)
        for v in reversed(vectors) if inverse else vectors:
            x = x - 2 * (x * v).sum(-1, keepdim=True) * v
        return x, x.new_zeros(x.shape[:-1])


class Permutation(Step):
    r"""A fixed reordering of the coordinates, :math:`y_i = x_{\sigma(i)}`, :math:`\log|\det| = 0`.

    The order is a buffer, so it follows the module to another device and into its state; that
    of Pyro's `Permute` does not.

    Args:
        order: sigma, each of 0 to D - 1 once.

    Raises:
        ValueError: if it is not a permutation.

    Example:
        >>> Permutation([2, 0, 1])(torch.tensor([10.0, 11.0, 12.0])).tolist()
        [12.0, 10.0, 11.0]
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, order: Sequence[int] | Tensor) -> None:
        order = torch.as_tensor(order, dtype=torch.long)
        super().__init__(len(order))
        if order.dim() != 1 or not torch.equal(order.sort().values, torch.arange(len(order))):
            raise ValueError(
                f"Permutation: order is {order.tolist()}; give each of 0 to D - 1 once."
            )
        self.register_buffer("order", order)
        self.register_buffer("inverse_order", order.argsort())

    def _push(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.order), x.new_zeros(x.shape[:-1])

    def _pull(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return y.index_select(-1, self.inverse_order), y.new_zeros(y.shape[:-1])


def strictly_lower(values: Tensor, dim: int) -> Tensor:
    """Fill the part below the diagonal, row by row, of matrices that are zero elsewhere."""
    rows, columns = torch.tril_indices(dim, dim, -1, device=values.device)
    flat = values.new_zeros(*values.shape[:-1], dim * dim)
    flat = flat.index_copy(-1, rows * dim + columns, values)
    return flat.reshape(*values.shape[:-1], dim, dim)


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply vectors (*S, D) by one matrix, by one along the last of *S, or each by its own."""
    if matrix.dim() == 2:
        return x @ matrix.mT
    if matrix.shape[-3] == 1:
        return x @ matrix.squeeze(-3).mT
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def solve(matrix: Tensor, y: Tensor, *, upper: bool = False) -> Tensor:
    """Solve triangular systems for vectors, with matrices as for `times`."""
    if matrix.dim() == 2 or matrix.shape[-3] == 1:
        rows = y.reshape(-1, y.shape[-1]) if matrix.dim() == 2 else y
        matrix = matrix if matrix.dim() == 2 else matrix.squeeze(-3)
        x = torch.linalg.solve_triangular(matrix.mT, rows, upper=not upper, left=False)
        return x.reshape(y.shape)
    return torch.linalg.solve_triangular(matrix, y.unsqueeze(-1), upper=upper).squeeze(-1)
