"""What stands where a program would, for compositions that are energies."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

__all__ = ["NotAProgram"]


class NotAProgram(nn.Module):
    """Raise when it is called, with the reason why there is no program.

    Args:
        reason: one sentence.

    Example:
        >>> NotAProgram("Product: an energy has no Pyro program.")()
        Traceback (most recent call last):
        TypeError: Product: an energy has no Pyro program.
    """

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise."""
        raise TypeError(self.reason)
