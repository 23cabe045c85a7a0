"""Likelihoods that say what they are: exact, a bound, an estimate, or known up to log Z."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Kind", "Likelihood", "weakest"]

Kind = Literal["exact", "bound", "estimate", "unnormalised"]
"""What a number is: exact, a lower bound in expectation, an estimate of either sign of error, or
a log density that lacks its log Z."""

_STRENGTH: dict[Kind, int] = {"exact": 0, "bound": 1, "estimate": 2, "unnormalised": 3}


def weakest(*kinds: Kind) -> Kind:
    """Return the kind of a sum of terms of these kinds.

    Example:
        >>> weakest("exact", "bound", "exact")
        'bound'
    """
    return max(kinds, key=_STRENGTH.__getitem__)


@dataclass(frozen=True)
class Likelihood:
    r"""Log densities per datum, in nats, with their kind and their Monte Carlo error.

    Args:
        value: $\log p(x_n)$ or what stands for it.  # (N,)
        kind: what ``value`` is; kinds never mix silently.
        std_error: Monte Carlo standard error of each value, the shared error included; ``None``
            where nothing was sampled.  # (N,)
        ess: effective sample size of the importance weights of each datum.  # (N,)
        pareto_k: Pareto shape $\hat k$ of those weights.  # (N,)
        num_samples: samples per datum (0: none were needed).
        shared_error: standard error of a term that all data share, such as an estimated log Z;
            it does not average out over data.
        doubt: why the error is not to be trusted, such as a Pareto k of an estimated log Z that
            is too large; ``None``: no reason is known.

    Example:
        >>> exact = Likelihood(torch.tensor([-1.0, -3.0]), "exact")
        >>> exact.mean, exact.kind
        (-2.0, 'exact')
    """

    value: Tensor
    kind: Kind
    std_error: Tensor | None = None
    ess: Tensor | None = None
    pareto_k: Tensor | None = None
    num_samples: int = 0
    shared_error: float = 0.0
    doubt: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in _STRENGTH:
            raise ValueError(
                f"Likelihood: kind is {self.kind!r}; it must be one of {', '.join(_STRENGTH)}."
            )

    def __len__(self) -> int:
        return self.value.shape[0]

    @property
    def mean(self) -> float:
        """Mean over the data, in nats."""
        return float(self.value.detach().double().mean())

    @property
    def standard_error(self) -> float:
        """Standard error of :attr:`mean`: spread over data and Monte Carlo, plus shared error.

        The spread of the values over data already holds their independent Monte Carlo errors. It
        is infinite where there is a :attr:`doubt`: no finite error would be honest.
        """
        if self.doubt is not None:
            return math.inf
        n = self.value.numel()
        spread = float(self.value.detach().double().std()) / math.sqrt(n) if n > 1 else math.nan
        return math.hypot(spread, self.shared_error)

    def __add__(self, constant: float) -> Likelihood:
        return replace(self, value=self.value + constant)

    @staticmethod
    def cat(parts: list[Likelihood]) -> Likelihood:
        """Join the likelihoods of consecutive blocks of data."""
        if not parts:
            raise ValueError("Likelihood.cat: there is no block to join; pass at least one.")

        def join(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            if name == "std_error" and any(v is not None for v in values):
                # What was not sampled has no Monte Carlo error.
                pairs = zip(values, parts, strict=True)
                values = [torch.zeros_like(p.value) if v is None else v for v, p in pairs]
            return None if any(v is None for v in values) else torch.cat(values)

        return Likelihood(
            value=torch.cat([part.value for part in parts]),
            kind=weakest(*(part.kind for part in parts)),
            std_error=join("std_error"),
            ess=join("ess"),
            pareto_k=join("pareto_k"),
            num_samples=max(part.num_samples for part in parts),
            shared_error=max(part.shared_error for part in parts),
            doubt=next((part.doubt for part in parts if part.doubt is not None), None),
        )

    def describe(self) -> str:
        """Return one line for people: mean, error, kind; a doubt takes the error's place."""
        words = {
            "exact": "exact",
            "bound": "lower bound",
            "estimate": "estimate",
            "unnormalised": "up to log Z",
        }[self.kind]
        samples = f", {self.num_samples} samples" if self.num_samples else ""
        if self.doubt is not None:
            return f"{self.mean:.2f} nats, error unknown ({words}{samples}; {self.doubt})"
        return f"{self.mean:.2f} ± {self.standard_error:.2f} nats ({words}{samples})"
