"""A law of grey levels: a logistic law rounded to the levels of a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

__all__ = ["DiscretizedLogistic", "check_levels"]


class DiscretizedLogistic(TorchDistribution):
    r"""Grey levels :math:`x = k / (L - 1)`, k = 0, ..., L - 1, with the bins of a logistic law.

    .. math:: p(k) = \sigma(b) - \sigma(a), \qquad
        a = \frac{(k - \frac12) / (L - 1) - \mu}{s}, \quad
        b = \frac{(k + \frac12) / (L - 1) - \mu}{s}

    The first bin reaches to minus infinity and the last to infinity, so that the L probabilities
    sum to 1. The difference is taken in logarithms,
    :math:`\log p = \log\sigma(b) + \log\sigma(-a) + \log(1 - e^{a - b})`, in which nothing cancels
    however far the location is from the level.

    Args:
        loc: mu, in the units of x.  # (*B)
        scale: s, positive.  # (*B)
        levels: L.

    Example:
        >>> law = DiscretizedLogistic(torch.tensor(0.4), torch.tensor(0.1))
        >>> round(float(law.log_prob(torch.arange(256) / 255).exp().sum()), 5)
        1.0

    Reference:
        Kingma et al., Improving variational inference with inverse autoregressive flow (2016),
        appendix on the discretised logistic likelihood.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - the name and form of torch
    support = constraints.unit_interval
    has_rsample = False

    def __init__(self, loc: Tensor, scale: Tensor, levels: int = 256) -> None:
        if levels < 2:
            raise ValueError(f"DiscretizedLogistic: levels is {levels}; give two or more.")
        shape = np.broadcast_shapes(loc.shape, scale.shape)
        self.loc, self.scale = loc.expand(shape), scale.expand(shape)
        self.levels = levels
        # Data are checked once, in words, by who scores them.
        super().__init__(self.loc.shape, validate_args=False)

    def expand(
        self, batch_shape: Any, _instance: DiscretizedLogistic | None = None
    ) -> DiscretizedLogistic:
        """Repeat the law over more batch dimensions."""
        new: DiscretizedLogistic = self._get_checked_instance(DiscretizedLogistic, _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.Size(batch_shape)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p of grey levels in [0, 1], each rounded to the nearest level."""
        last = self.levels - 1
        level = (value * last).round()
        width = 1 / (last * self.scale)
        middle = (level / last - self.loc) / self.scale
        below = logsigmoid(middle + 0.5 * width)
        above = logsigmoid(0.5 * width - middle)
        inside = (-torch.expm1(-width)).log()
        lowest, highest = level <= 0, level >= last
        return (
            torch.where(highest, 0.0, below)
            + torch.where(lowest, 0.0, above)
            + torch.where(lowest | highest, 0.0, inside)
        )

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw grey levels."""
        shape = self._extended_shape(torch.Size(sample_shape))
        uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
        eps = torch.finfo(self.loc.dtype).eps
        drawn = self.loc + self.scale * uniform.clamp(eps, 1 - eps).logit()
        last = self.levels - 1
        return (drawn * last).round().clamp(0, last) / last

    @property
    def mean(self) -> Tensor:
        r"""The mean grey level, :math:`\sum_{k \ge 1} p(x \ge k) / (L - 1)`."""
        last = self.levels - 1
        total = torch.zeros_like(self.loc)
        for level in range(1, self.levels):  # one after the other: all at once take L times as much
            total = total + ((self.loc - (level - 0.5) / last) / self.scale).sigmoid()
        return total / last


def check_levels(where: str, name: str, x: Tensor, levels: int) -> None:
    """Refuse data that are not grey levels.

    Raises:
        ValueError: values outside [0, 1], or between the levels.
    """
    scaled = x * (levels - 1)
    if not bool(((x >= 0) & (x <= 1) & ((scaled - scaled.round()).abs() < 1e-2)).all()):
        raise ValueError(
            f"{where}: '{name}' holds values other than the {levels} levels 0, 1/{levels - 1}, "
            "..., 1, which a discretised likelihood scores; round the data to them, or use "
            "likelihood='gaussian'."
        )
