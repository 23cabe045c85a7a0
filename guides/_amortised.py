"""What amortised guides share: an encoder that gives each datum its base law and its context."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

__all__ = ["Amortised"]

_MIN_SCALE = 1e-4


class Amortised(nn.Module):
    """A guide whose one site has, for each datum, a law around the encoder's normal.

    Args:
        encoder: a network from data to outputs as the guides describe them.
        latent: dimension D of the hidden site.
        context: width of the context that flows take.
        hidden: name of the hidden site.
        event_dim: dimensions of one datum; what the encoder says, else 1, where left out.
    """

    def __init__(
        self, encoder: nn.Module, latent: int, context: int, hidden: str, event_dim: int | None
    ) -> None:
        super().__init__()
        if latent < 1:
            raise ValueError(f"{self._name}: latent is {latent}; give one dimension or more.")
        self.encoder, self.latent, self.context, self.hidden = encoder, latent, context, hidden
        said = getattr(encoder, "event_dim", 1)
        self.event_dim: int = said if event_dim is None else event_dim

    @property
    def _name(self) -> str:
        return type(self).__name__

    def law(self, base: TorchDistribution, context: Tensor | None) -> TorchDistribution:
        """Return q(z | x), given its base and context."""
        raise NotImplementedError

    def base(self, x: Tensor) -> tuple[TorchDistribution, Tensor | None]:
        """Return the normal law q_0(z | x) and the context of each datum.

        Args:
            x: data, with any number of dimensions before those of the data.  # (*P, N, ...)
        """
        cut = x.dim() - self.event_dim
        if cut < 1:
            raise ValueError(
                f"{self._name}: data of shape {tuple(x.shape)} came for {self.event_dim} "
                "dimensions of one datum; pass (N, ...), or say event_dim."
            )
        # Particles stand before the data; batch norms and convolutions take one such dimension.
        out = self.encoder(x.reshape(-1, *x.shape[cut:]))
        loc, raw, context = self._split(out)
        lead = x.shape[:cut]
        scale = nn.functional.softplus(raw) + _MIN_SCALE
        normal = dist.Normal(loc.reshape(*lead, -1), scale.reshape(*lead, -1)).to_event(1)
        return normal, None if context is None else context.reshape(*lead, -1)

    def _split(self, out: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        parts = list(out) if isinstance(out, tuple) else self._cut(out)
        widths = [part.shape[-1] for part in parts]
        wanted = [self.latent, self.latent, *([self.context] if self.context else [])]
        if widths[: len(wanted)] != wanted or len(widths) > 3:
            raise ValueError(
                f"{self._name}: the encoder gave outputs of widths {widths}; it must give "
                f"{' + '.join(map(str, wanted))}: location, raw scale"
                f"{' and context' * bool(self.context)}, side by side or as a tuple."
            )
        return parts[0], parts[1], parts[2] if self.context else None

    def _cut(self, out: Tensor) -> list[Tensor]:
        if out.shape[-1] != 2 * self.latent + self.context:
            return [out]
        sizes = [self.latent, self.latent, *([self.context] if self.context else [])]
        return list(torch.split(out, sizes, -1))

    def forward(self, x: Tensor) -> None:
        """Run the guide on data x."""
        base, context = self.base(x)
        with pyro.plate("data", x.shape[-1 - self.event_dim], device=x.device):
            pyro.sample(self.hidden, self.law(base, context))
