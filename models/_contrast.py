"""The loss of contrastive divergence with its gradient in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

__all__ = ["contrast"]


class _Contrast(torch.autograd.Function):
    """Value and gradient from the same three products, with nothing kept but the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        visible_bias: Tensor,
        hidden_bias: Tensor,
        weight: Tensor,
        rows: Tensor,
        num_data: int,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        fields = torch.addmm(hidden_bias, rows, weight)
        signs = rows.new_empty(len(rows))
        if weights is None:
            energies = -torch.mv(rows[:num_data], visible_bias).sum()
            energies -= softplus(fields[:num_data], threshold=50.0).sum()
            signs[:num_data], total = -1.0, float(num_data)
        else:
            free = torch.mv(rows[:num_data], visible_bias)
            free += softplus(fields[:num_data], threshold=50.0).sum(-1)
            energies = -torch.dot(weights, free)
            signs[:num_data], total = -weights, float(weights.sum())
        signs[num_data:] = total / (len(rows) - num_data)
        hidden = torch.sigmoid(fields).mul_(signs.unsqueeze(-1))
        ctx.save_for_backward(torch.mv(rows.mT, signs), hidden.sum(0), torch.mm(rows.mT, hidden))
        ctx.mark_non_differentiable(fields)
        return energies, fields

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return *(grad * saved for saved in ctx.saved_tensors), None, None, None


def contrast(
    visible_bias: Tensor,
    hidden_bias: Tensor,
    weight: Tensor,
    rows: Tensor,
    num_data: int,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return the free energy of data with the gradient of minus their log likelihood.

    .. math:: \textstyle \sum_n w_n F(v_n), \qquad
        \partial \Big( \sum_n w_n F(v_n) - \frac{\sum_n w_n}{C} \sum_c F(\tilde v_c) \Big)

    The chains enter the gradient, in place of that of log Z, and not the value.

    Args:
        visible_bias: biases b.  # (V,)
        hidden_bias: biases c.  # (H,)
        weight: couplings W.  # (V, H)
        rows: N data, then C visible states of chains.  # (N + C, V)
        num_data: number of data N.
        weights: a weight for each datum; 1 where left out.  # (N,)

    Returns:
        The summed free energy in nats and the fields on the hidden units.  # (), (N + C, H)

    Example:
        >>> parameters = torch.zeros(3), torch.zeros(2), torch.zeros(3, 2)
        >>> loss, fields = contrast(*parameters, torch.ones(7, 3), 4)
        >>> bool(torch.isclose(loss, -8 * torch.tensor(2.0).log())), fields.shape
        (True, torch.Size([7, 2]))

    Reference:
        Tieleman, Training restricted Boltzmann machines using approximations to the likelihood
        gradient (2008), section 2.
    """
    parameters = visible_bias, hidden_bias, weight
    loss, fields = _Contrast.apply(  # type: ignore[no-untyped-call]
        *parameters, rows, num_data, weights
    )
    return loss, fields
