"""Reference draws, such as those of NUTS: how they come, and how far they can be believed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyroboost import _arviz
from pyroboost.diagnostics._draws import columns

__all__ = ["Reference", "read_reference"]

_R_HAT, _ESS = 1.01, 400.0


@dataclass(frozen=True)
class Reference:
    """Reference draws by site and what their chains say of them.

    Args:
        chains: values by site.  # (C, S, ...)
        r_hat: the largest split R-hat; of halves where there is one chain.
        ess: the smallest bulk effective sample size, of all draws.
        worst: the coordinates with those.
        chained: whether the chains were told apart.
    """

    chains: dict[str, Tensor] = field(repr=False)
    r_hat: float
    ess: float
    worst: tuple[str, str]
    chained: bool

    @property
    def draws(self) -> dict[str, Tensor]:
        """Draws of all chains, one after another.  # (C * S, ...)."""
        return {name: value.flatten(0, 1) for name, value in self.chains.items()}

    @property
    def num_draws(self) -> int:
        """Draws in all chains."""
        first = next(iter(self.chains.values()))
        return first.shape[0] * first.shape[1]

    def thin(self, count: int) -> Reference:
        """Keep at most so many draws, evenly spaced in every chain."""
        chains, draws = next(iter(self.chains.values())).shape[:2]
        kept = min(draws, max(1, count // chains))
        at = torch.linspace(0, draws - 1, kept).round().long()
        return Reference(
            {name: value[:, at] for name, value in self.chains.items()},
            self.r_hat,
            self.ess,
            self.worst,
            self.chained,
        )

    def doubts(self) -> list[str]:
        """Say why the reference itself may be wrong; nothing where no reason is seen."""
        found = []
        if self.r_hat > _R_HAT:
            found.append(
                f"The reference has not converged: R-hat {self.r_hat:.3f} of {self.worst[0]} is "
                f"above {_R_HAT}; run longer chains before trusting what is measured against it."
            )
        if self.ess < _ESS:
            found.append(
                f"The reference is short: ESS {self.ess:.0f} of {self.worst[1]} is below "
                f"{_ESS:.0f}, so that errors up to {self.ess**-0.5:.2f} sd are its own."
            )
        if not self.chained:
            found.append(
                "The reference came as one chain: chains that sit in different modes cannot be "
                "told from one that has seen all; pass an MCMC or group_by_chain=True."
            )
        return found


def read_reference(where: str, reference: Any, group_by_chain: bool) -> Reference:
    """Read an MCMC, ArviZ's data with a posterior, or a dict of draws, and check the chains."""
    if isinstance(reference, Reference):
        return reference
    chained = group_by_chain
    if hasattr(reference, "get_samples"):
        reference, chained = reference.get_samples(group_by_chain=True), True
    group: Any = getattr(reference, "posterior", None)
    if hasattr(group, "data_vars"):
        names = [str(name) for name in group.data_vars]
        reference, chained = {n: torch.tensor(group[n].to_numpy()) for n in names}, True
    if not isinstance(reference, Mapping) or not reference:
        raise TypeError(
            f"{where}: the reference is {type(reference).__name__}; pass an MCMC that has run, "
            "ArviZ's InferenceData with a posterior, or a dict of draws by site."
        )
    chains = {
        name: (torch.as_tensor(value) if chained else torch.as_tensor(value)[None]).detach()
        for name, value in reference.items()
    }
    leads = {tuple(value.shape[:2]) for value in chains.values()}
    if len(leads) > 1 or any(len(lead) < 2 or lead[1] < 4 for lead in leads):
        raise ValueError(
            f"{where}: the reference has (chains, draws) {sorted(leads)}; pass as many draws for "
            "every site, at least four."
        )
    for name, value in chains.items():
        if not bool(value.double().isfinite().all()):
            raise ValueError(
                f"{where}: the reference has draws of '{name}' that are NaN or infinite."
            )
    return _checked(chains, chained)


def _checked(chains: dict[str, Tensor], chained: bool) -> Reference:
    count, draws = next(iter(chains.values())).shape[:2]
    table, names = columns({n: v.flatten(0, 1) for n, v in chains.items()})
    table = table.reshape(count, draws, -1)
    ess, r_hat = convergence(table)
    ess[ess.isnan()], r_hat[r_hat.isnan()] = torch.inf, -torch.inf  # what never moves
    high, low = int(r_hat.argmax()), int(ess.argmin())
    moves = bool(r_hat.isfinite().any())
    return Reference(
        chains,
        float(r_hat[high]) if moves else 1.0,
        min(float(ess[low]), float(count * draws)),
        (names[high], names[low]),
        chained,
    )


def convergence(table: Tensor) -> tuple[Tensor, Tensor]:
    """Bulk ESS and split R-hat of (C, S, D); one chain is judged by its halves.  # (D,)."""
    if len(table) == 1:
        half = table.shape[1] // 2
        table = torch.cat([table[:, :half], table[:, half : 2 * half]])
    ess, r_hat = _arviz.convergence(table.double().numpy())
    return torch.as_tensor(ess), torch.as_tensor(r_hat)
