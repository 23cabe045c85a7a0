"""An energy that keeps its log Z with the parameters that it belongs to."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyroboost.compose.energy import Energy, fingerprint
from pyroboost.compose.partition import METHODS, Partition, doubt_of

__all__ = ["Stored"]

_UNKNOWN = -1


class Stored(Energy):
    """An energy with a log Z that is refused once the parameters or the powers have changed.

    Args:
        visible: name of the visible site.
    """

    stored: Tensor
    evaluated: Tensor

    def __init__(self, visible: str) -> None:
        super().__init__(visible)
        # value, standard error, ESS, k-hat, draws, place in METHODS, in doubt, biased
        blank = torch.tensor([math.nan] * 4 + [0.0, _UNKNOWN, 0.0, 0.0], dtype=torch.float64)
        self.register_buffer("stored", blank)
        self.register_buffer("evaluated", torch.tensor(0))

    def _depends_on(self) -> list[nn.Module]:
        """Return the modules whose parameters and buffers log Z depends on."""
        raise NotImplementedError

    def _fingerprint(self) -> Tensor:
        return fingerprint(*self._depends_on()).to(self.evaluated.device)

    @property
    def is_fresh(self) -> bool:
        """Whether the stored log Z is that of the present parameters and powers."""
        return int(self.stored[5]) != _UNKNOWN and bool(self.evaluated == self._fingerprint())

    @property
    def partition(self) -> Partition:
        """The stored log Z with its error.

        Raises:
            ValueError: it is unknown, or of other parameters or powers than the present ones.
        """
        if not self.is_fresh:
            state = "unknown" if int(self.stored[5]) == _UNKNOWN else "out of date"
            raise ValueError(
                f"{type(self).__name__}: log Z is {state} for the present parameters and powers, "
                "so there is no likelihood; call .log_partition() or .refresh() first."
            )
        value, error, ess, k, draws, method, doubted, biased = self.stored.tolist()
        doubt = doubt_of(k, int(draws))
        if doubt is None:
            known = math.isfinite(error)
            why = "its chains have not mixed" if known else "that of a proposing part is in doubt"
            doubt = f"log Z not to be trusted: {why}"
        return Partition(
            value,
            error,
            METHODS[int(method)],
            ess,
            k,
            int(draws),
            doubt if doubted else None,
            "biased: estimated densities" if biased else None,
        )

    def keep(self, found: Partition) -> None:
        """Store an estimate of log Z for the present parameters and powers."""
        numbers = [
            found.value,
            found.std_error,
            found.ess,
            found.pareto_k,
            found.num_samples,
            METHODS.index(found.method),
            found.doubt is not None,
            found.bias is not None,
        ]
        self.stored.copy_(torch.tensor(numbers, dtype=torch.float64))
        self.evaluated.copy_(self._fingerprint())

    def _state_of_log_z(self) -> str:
        return METHODS[int(self.stored[5])] if self.is_fresh else "unknown"
