"""Networks that the shipped meta-models are built from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Folded", "mlp", "split_scale"]

_MIN_SCALE = 1e-4


def mlp(
    sizes: Sequence[int], *, batch_norm: bool = True, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Build a fully connected network whose hidden layers are normalised over the batch.

    Args:
        sizes: widths from input to output, at least two.
        batch_norm: whether each hidden layer is followed by batch normalisation.
        activation: class of the nonlinearity.

    Returns:
        The network; its last layer is linear.

    Example:
        >>> mlp([4, 8, 2])(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes[:-1]):
        layers.append(nn.Linear(before, after, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(after))
        layers.append(activation())
    layers.append(nn.Linear(sizes[-2], sizes[-1]))
    return nn.Sequential(*layers)


class Folded(nn.Module):
    """Run a network on values with any number of leading dimensions, as if they were data.

    Vectorised particles and enumeration put dimensions in front of the data; batch norms and
    convolutions take exactly one.

    Args:
        net: a network on (N, ...) or, if ``flat``, on (N, D).
        event_dim: dimensions of one input value.
        flat: whether the input's event dimensions are flattened first.
        shape: event shape to which the output is brought; ``None`` leaves it.
    """

    def __init__(
        self,
        net: nn.Module,
        event_dim: int,
        *,
        flat: bool = False,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.event_dim, self.flat, self.shape = event_dim, flat, shape

    def forward(self, value: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Fold, run, unfold."""
        cut = value.dim() - self.event_dim
        lead, event = value.shape[:cut], value.shape[cut:]
        rows = value.reshape(-1, event.numel()) if self.flat else value.reshape(-1, *event)
        out = self.net(rows)
        if isinstance(out, tuple):
            return tuple(self._unfold(part, lead) for part in out)
        return self._unfold(out, lead)

    def _unfold(self, out: Tensor, lead: torch.Size) -> Tensor:
        return out.reshape(*lead, *(out.shape[1:] if self.shape is None else self.shape))


def split_scale(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Read a location and a positive scale off the output of a network.

    Args:
        out: a pair (location, raw scale), or one tensor with both side by side in its last
            dimension.

    Returns:
        Location and scale, the latter ``softplus`` of the raw scale.
    """
    loc, raw = out if isinstance(out, tuple) else out.chunk(2, -1)
    return loc, nn.functional.softplus(raw) + _MIN_SCALE
