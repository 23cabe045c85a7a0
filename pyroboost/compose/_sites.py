"""The sites of a mixture's parts: where they stood, what they are called, their plates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroboost.handlers import is_plate

__all__ = ["Names", "Plates", "Site", "placed"]


@dataclass
class Site:
    """One site of a part where it stood: its law, plates, scale and mask, and its value."""

    name: str
    fn: Any
    frames: tuple[Any, ...]
    scale: Any
    mask: Any
    observed: bool
    infer: dict[str, Any]
    value: Any = None

    @property
    def deterministic(self) -> bool:
        """Whether it is a statement of ``pyro.deterministic``."""
        return bool(self.infer.get("_deterministic"))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of a value, with the mask and without the scale."""
        return self.masked(self.fn.log_prob(value))

    def masked(self, terms: Tensor) -> Tensor:
        """Apply the mask."""
        if self.mask is None:
            return terms
        on = torch.as_tensor(self.mask, device=terms.device)
        return torch.where(on, terms, terms.new_zeros(()))


@dataclass(frozen=True)
class Names:
    """The names in the mixture of one part's sites and plates.

    Args:
        index: the part's place.
        plates: names of plates that it shares with the first part.
        data_dim: dimension of the plate over data.
    """

    index: int
    plates: Mapping[str, str]
    data_dim: int

    def site(self, name: str) -> str:
        """Return the name in the mixture of a site of its own."""
        return f"{self.index}.{name}"

    def plate(self, name: str) -> str:
        """Return the name in the mixture of a plate."""
        return self.plates.get(name, name if self.index == 0 else f"{self.index}.{name}")

    def read(self, msg: Any) -> Site:
        """Return a site with the names that its plates have in the mixture."""
        frames = tuple(f._replace(name=self.plate(f.name)) for f in msg["cond_indep_stack"])
        site = Site(
            msg["name"],
            msg["fn"],
            frames,
            msg["scale"],
            msg["mask"],
            msg["is_observed"],
            msg["infer"],
            msg["value"],
        )
        if not site.deterministic and not any(f.dim == self.data_dim for f in frames):
            raise ValueError(
                f"Mixture: the site '{site.name}' of part {self.index} is outside of the plate "
                "over data, and a component is drawn for each datum; move it into the plate."
            )
        return site

    def per_datum(self, site: Site, terms: Tensor) -> Tensor:
        """Sum terms of a site over its own plates, leaving data and whatever is left of them."""
        for frame in site.frames:
            if frame.vectorized and frame.dim != self.data_dim and -frame.dim <= terms.dim():
                terms = terms.sum(frame.dim, keepdim=True)
        return terms


class Plates(Messenger):
    """Let a plate that several programs open take its rows, and speak to others, only once.

    Args:
        names: the names of the part that is run.
        rows: the rows of the plates met so far, by name; all runs of one program write into it.
        quiet: do not speak of plates at all.
    """

    def __init__(self, names: Names, rows: dict[str, Any], *, quiet: bool = False) -> None:
        super().__init__()
        self.names, self.rows, self.quiet = names, rows, quiet

    def _pyro_sample(self, msg: Any) -> None:
        if not is_plate(msg):
            return
        name = self.names.plate(msg["name"])
        if name in self.rows:
            msg["value"] = self.rows[name] if msg["value"] is None else msg["value"]
            msg["done"] = msg["stop"] = True
        elif self.quiet:
            msg["stop"] = True
        msg["name"] = name

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_plate(msg) and not self.quiet:
            self.rows.setdefault(msg["name"], msg["value"])


class _Placed(Messenger):
    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def _pyro_sample(self, msg: Any) -> None:
        site = self.site
        msg["cond_indep_stack"] = site.frames
        msg["scale"] = site.scale
        msg["mask"] = site.mask
        BroadcastMessenger._pyro_sample(msg)


@contextmanager
def placed(site: Site, *, mask: Tensor | None = None) -> Iterator[None]:
    """Say a ``pyro.sample`` where a site of a part stood: in its plates, at its scale."""
    if mask is not None:
        site = replace(site, mask=mask if site.mask is None else mask & site.mask)
    with _Placed(site):
        yield
