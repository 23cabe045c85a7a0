"""The parts of a product: which there may be, and their densities up to log Z."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Self, cast, overload

import torch
from torch import Tensor, nn

from pyroboost.compose._stored import Stored
from pyroboost.compose.densities import (
    check_data,
    is_estimated,
    label,
    log_density_of,
    support_of,
)
from pyroboost.compose.energy import Ratio
from pyroboost.metamodel import MetaModel

__all__ = ["Factors"]


class Factors(Stored):
    """Meta-models to powers, over one support; :class:`Product` says what they are.

    Args:
        *parts: meta-models over one visible site, or a :class:`Ratio`.
        powers: the powers; one number counts for all.
        num_samples: importance samples per datum, for parts that do not know their density.
    """

    powers: Tensor

    def __init__(
        self,
        *parts: MetaModel,
        powers: float | Sequence[float] | Tensor = 1.0,
        num_samples: int = 50,
    ) -> None:
        flat, exponents = flatten(parts, check_powers(powers, len(parts)))
        super().__init__(flat[0].visible)
        if num_samples < 1:
            raise ValueError(f"Product: num_samples is {num_samples}; take at least one.")
        self.num_samples = num_samples
        self.parts = nn.ModuleList(flat)
        self.register_buffer("powers", torch.tensor(exponents, dtype=torch.float64))
        self._support: str | None = None
        self._estimated: list[int] | None = None
        if not self.samplers:
            raise ValueError(
                "Product: all parts are ratios of densities; one at least must be a density."
            )
        self._check_parts()

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[MetaModel]:
        return (cast(MetaModel, part) for part in self.parts)

    @overload
    def __getitem__(self, index: int) -> MetaModel: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> MetaModel | Self:
        if isinstance(index, slice):
            powers = self.powers[index].tolist()
            return type(self)(*list(self)[index], powers=powers, num_samples=self.num_samples)
        return list(self)[index]

    @property
    def visible_shape(self) -> tuple[int, ...] | None:
        """Shape of one datum, as the parts know it."""
        return next((p.visible_shape for p in self if p.visible_shape is not None), None)

    @visible_shape.setter
    def visible_shape(self, shape: tuple[int, ...] | None) -> None:
        for part in self:
            if part.visible_shape is None:
                part.visible_shape = shape

    @property
    def samplers(self) -> list[int]:
        """Places of the parts that can be sampled: all but ratios."""
        return [i for i, part in enumerate(self) if not isinstance(part, Ratio)]

    @property
    def estimated(self) -> list[int]:
        """Places of the parts whose density is estimated anew at each x."""
        if self._estimated is None:
            self._check_parts()
            self._estimated = [i for i, part in enumerate(self) if is_estimated(part)]
        return self._estimated

    @property
    def support(self) -> str | None:
        """What x is made of, in words: "bits", "reals", ...; ``None`` while it is not known."""
        if self._support is None:
            self._check_parts()
        return self._support

    def _check_parts(self) -> None:
        """Refuse parts that are densities over different things."""
        self.visible_shape = self.visible_shape
        shapes = {p.visible_shape for p in self if p.visible_shape is not None}
        if len(shapes) > 1:
            told = ", ".join(f"{label(i, p)} {p.visible_shape}" for i, p in enumerate(self))
            raise ValueError(f"Product: the parts take data of different shapes: {told}.")
        first = 0
        for index, part in enumerate(self):
            name = support_of(part)
            if name is None:
                continue
            if self._support is None:
                self._support, first = name, index
            if name != self._support:
                raise ValueError(
                    f"Product: {label(first, self[first])} is a density over {self._support} and "
                    f"{label(index, part)} one over {name}, and their product is neither; use "
                    "parts over one support (a diagonal GMM's on_bits() is a mixture over bits)."
                )

    @torch.no_grad()
    def table(
        self,
        x: Tensor,
        *,
        num_samples: int | None = None,
        memory: float = 256.0,
        skip: Sequence[int] = (),
    ) -> Tensor:
        r"""Return $\log m_i(x)$ of each part in double precision, without gradients.

        Args:
            x: data.  # (N, ...)
            num_samples: importance samples per datum, for parts that do not know their density.
            memory: bound on their working memory, in MiB.
            skip: parts that are not asked; their rows are NaN.

        Returns:
            Log densities in nats, each up to its own constant.  # (P, N)
        """
        count = self.num_samples if num_samples is None else num_samples
        rows = []
        for index, part in enumerate(self):
            if index in skip:
                rows.append(torch.full((len(x),), math.nan, dtype=torch.float64, device=x.device))
                continue
            found = log_density_of(part, x, num_samples=count, memory=memory)
            rows.append(found.value.double())
        return torch.stack(rows)

    def _learn(self, x: Tensor) -> None:
        """Check data, whose shape the parts may not have known before."""
        if self.visible_shape is None:
            self.visible_shape = tuple(x.shape[1:])
        check_data(x, self.visible_shape, self.support, "Product")

    def _depends_on(self) -> list[nn.Module]:
        powers = nn.Module()
        powers.register_buffer("powers", self.powers)
        return [powers, *self]

    def closed_form(self) -> MetaModel | None:
        """Return one meta-model with this very density, where the parts' classes have it.

        Mixtures of Gaussians and of Bernoullis, and RBMs over one visible layer, for positive
        integer powers; single Gaussians for any positive powers. Its log Z is up to date.

        Returns:
            A meta-model of the parts' class, or ``None``.
        """
        closed = self._closed()
        return None if closed is None else closed[0]

    def _closed(self) -> tuple[MetaModel, float] | None:
        """Ask the first part, which knows its class."""
        if len(self) == 1 and float(self.powers) == 1.0:
            return self[0], 0.0
        return self[0].multiplied(list(self), self.powers.tolist())

    def named_trainable(self, *batch: Any) -> dict[str, Tensor]:
        """Return the parameters of all parts; :func:`multiplicative` trains them in rounds."""
        found: dict[str, Tensor] = {}
        for index, part in enumerate(self):
            own = (
                dict(part.named_parameters())
                if not part.is_program
                else part.named_trainable(*batch)
            )
            found.update({f"parts.{index}.{name}": p for name, p in own.items() if p.requires_grad})
        return found


def check_powers(powers: float | Sequence[float] | Tensor, count: int) -> list[float]:
    """Return one positive number per part."""
    found = torch.as_tensor(powers, dtype=torch.float64)
    found = found.expand(count) if found.dim() == 0 else found
    if found.shape != (count,) or not bool((found.isfinite() & (found > 0)).all()):
        raise ValueError(
            f"Product: powers are {powers} for {count} parts; give one positive number, or one "
            "for each part (a part of power 0 is left out)."
        )
    return found.tolist()


def flatten(
    parts: Sequence[MetaModel], powers: Sequence[float]
) -> tuple[list[MetaModel], list[float]]:
    """Replace products among the parts by their own parts, and multiply their powers."""
    if not parts:
        raise ValueError("Product: there is no part; pass at least one meta-model.")
    flat: list[MetaModel] = []
    exponents: list[float] = []
    for index, (part, power) in enumerate(zip(parts, powers, strict=True)):
        if not isinstance(part, MetaModel):
            raise TypeError(
                f"Product: part {index} is {type(part).__name__}, not a meta-model; wrap the pair "
                "in MetaModel(model, guide, visible=..., hidden=...)."
            )
        if isinstance(part, Factors):
            flat += list(part)
            exponents += [power * inner for inner in part.powers.tolist()]
        else:
            flat.append(part)
            exponents.append(power)
    return flat, exponents
