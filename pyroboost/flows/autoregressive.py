"""Inverse autoregressive steps: fast to draw from, one coordinate at a time to score."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyroboost.flows.flow import Flow
from pyroboost.flows.linear import Permutation
from pyroboost.flows.step import Step

__all__ = ["InverseAutoregressive", "iaf"]

KEEP = 2.0  # the gates' first logit: most of a coordinate is kept, as in a forget gate


class _Masked(nn.Linear):
    """A linear layer some of whose weights are zero."""

    mask: Tensor

    def __init__(self, before: Tensor, after: Tensor, *, strict: bool) -> None:
        super().__init__(len(before), len(after))
        seen = after[:, None] > before if strict else after[:, None] >= before
        self.register_buffer("mask", seen.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


class InverseAutoregressive(Step):
    r"""One step of an inverse autoregressive flow, gated like a memory cell.

    .. math:: y_i = g_i x_i + (1 - g_i)\, m_i, \qquad g_i = \sigma(s_i + 2), \qquad
        (m_i, s_i) = \mathrm{net}(x_{<i}, c)_i, \qquad \log|\det| = \textstyle\sum_i \log g_i

    The network is a masked one with a single hidden layer, which the context enters. Drawing is
    one pass of it. The inverse is exact and takes D passes, so a mixture takes such a step only
    with ``allow_slow``.

    Args:
        dim: D, the number of coordinates, two or more.
        context: width C of the context; 0 for none.
        units: width of the hidden layer.
        spread: size of the network's first outputs; 0 starts at m = s = 0.

    Example:
        >>> step = InverseAutoregressive(4, units=16, spread=1.0).double()
        >>> x = torch.randn(10, 4, dtype=torch.float64)
        >>> y, log_det = step.push(x)
        >>> bool(torch.isclose(step.pull(y)[0], x).all()), log_det.shape
        (True, torch.Size([10]))

    Reference:
        Kingma et al., Improving variational inference with inverse autoregressive flow (2016),
        Eq. 13-14; Germain et al., MADE (2015), section 4.
    """

    smallest = 2
    slow = True

    def __init__(
        self, dim: int, *, context: int = 0, units: int = 64, spread: float = 0.01
    ) -> None:
        super().__init__(dim, context)
        if units < 1:
            raise ValueError(f"InverseAutoregressive: units is {units}; give one or more.")
        places = torch.arange(1, dim + 1)
        hidden = torch.arange(units) % (dim - 1) + 1
        self.inner = _Masked(places, hidden, strict=False)
        self.outer = _Masked(hidden, places.repeat(2), strict=True)
        self.enter = nn.Linear(context, units, bias=False) if context else None
        with torch.no_grad():
            self.outer.weight.normal_(0.0, spread / math.sqrt(units))
            self.outer.bias.normal_(0.0, spread)

    def _numbers(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return m, and the logits of the gates."""
        h = self.inner(x)
        if self.enter is not None:
            h = h + self.enter(context)
        m, s = self.outer(nn.functional.elu(h)).chunk(2, -1)
        return m, s + KEEP

    def _push(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        m, logits = self._numbers(x, context)
        y = m + logits.sigmoid() * (x - m)
        return y, nn.functional.logsigmoid(logits).sum(-1)

    def _pull(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = torch.zeros_like(y)
        for i in range(self.dim):
            m, logits = self._numbers(x, context)
            found = m[..., i] + (y - m)[..., i] / logits[..., i].sigmoid()
            x = torch.cat([x[..., :i], found.unsqueeze(-1), x[..., i + 1 :]], -1)
        return x, -nn.functional.logsigmoid(self._numbers(x, context)[1]).sum(-1)


def iaf(
    dim: int, steps: int = 8, *, units: int = 64, context: int = 0, spread: float = 0.01
) -> Flow:
    """Build an inverse autoregressive flow, coordinates reversed before every second step.

    Args:
        dim: D, two or more.
        steps: the number of `InverseAutoregressive` steps.
        units: width of the networks' one hidden layer.
        context: width C of a context on which the flow depends; 0 for none.
        spread: size of the networks' first outputs.

    Raises:
        ValueError: if there is no step.

    Example:
        >>> iaf(3, steps=2)
        Flow('iaf', dim=3: InverseAutoregressive, Permutation, InverseAutoregressive)
    """
    if steps < 1:
        raise ValueError(f"flows.iaf: steps is {steps}; give one or more.")
    listed: list[Step] = []
    for k in range(steps):
        listed += [Permutation(range(dim - 1, -1, -1))] if k % 2 else []
        listed += [InverseAutoregressive(dim, context=context, units=units, spread=spread)]
    return Flow(listed, name="iaf")
