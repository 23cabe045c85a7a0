"""Draws of Markov chains with what is known of their mixing."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyroboost import _arviz

__all__ = ["Chains"]


@dataclass(frozen=True)
class Chains:
    """Draws of several chains of one law.

    Args:
        values: draws.  # (C, S, ...)
        log_density: log density of each draw up to a constant, as the chains knew it.  # (C, S)
        method: how they were made.
        acceptance: share of proposals that were accepted.
        exact: whether the law that the chains leave invariant is exactly the one asked for.
        words: what ``exact`` rests on, or why it is not so.
        name: the site's name.

    Example:
        >>> chains = Chains(torch.randn(4, 50, 2), torch.randn(4, 50), "metropolis", 1.0, True, "")
        >>> chains.ess.shape, chains.r_hat.shape
        (torch.Size([2]), torch.Size([2]))
    """

    values: Tensor = field(repr=False)
    log_density: Tensor = field(repr=False)
    method: str
    acceptance: float
    exact: bool
    words: str
    name: str = "x"

    @cached_property
    def _convergence(self) -> tuple[Tensor, Tensor]:
        flat = self.values.reshape(*self.values.shape[:2], -1)
        return _convergence(flat, self.values.shape[2:])

    @cached_property
    def _of_log_density(self) -> tuple[Tensor, Tensor]:
        return _convergence(self.log_density[..., None], ())

    @property
    def ess(self) -> Tensor:
        """Bulk effective sample size of each coordinate; NaN where it never moves."""
        return self._convergence[0]

    @property
    def r_hat(self) -> Tensor:
        """Split R-hat of each coordinate; NaN where it never moves."""
        return self._convergence[1]

    @property
    def ess_log_density(self) -> float:
        """Bulk effective sample size of the log density."""
        return float(self._of_log_density[0])

    @property
    def r_hat_log_density(self) -> float:
        """Split R-hat of the log density."""
        return float(self._of_log_density[1])

    @property
    def draws(self) -> Tensor:
        """All draws in one batch, (C * S, ...)."""
        return self.values.flatten(0, 1)

    def to_arviz(self) -> Any:
        """Return the draws and their log densities as ArviZ groups."""
        import xarray as xr

        values = self.values.detach().cpu().numpy()
        axes = [f"{self.name}_dim_{i}" for i in range(values.ndim - 2)]
        posterior = xr.Dataset({self.name: (("chain", "draw", *axes), values)})
        stats = xr.Dataset({"lp": (("chain", "draw"), self.log_density.detach().cpu().numpy())})
        for group in (posterior, stats):
            group.coords["chain"] = range(values.shape[0])
            group.coords["draw"] = range(values.shape[1])
        return _arviz.container({"posterior": posterior, "sample_stats": stats})

    def describe(self) -> str:
        """Return one line for people."""
        count = self.values.shape[0] * self.values.shape[1]
        law = "exact" if self.exact else "approximate"
        return (
            f"{self.values.shape[0]} chains, {count} draws by {self.method}: ESS of the log "
            f"density {self.ess_log_density:.0f}, R-hat {self.r_hat_log_density:.3f}, acceptance "
            f"{self.acceptance:.2f}; {law}: {self.words}"
        )


def _convergence(draws: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    table = draws.detach().to("cpu", torch.float64).numpy()
    if table.shape[1] < 4:
        blank = torch.full(shape, torch.nan)
        return blank, blank.clone()
    ess, r_hat = _arviz.convergence(table)
    return torch.from_numpy(ess).reshape(shape), torch.from_numpy(r_hat).reshape(shape)
