"""Variables with named dimensions, collected draw by draw and made into ArviZ's groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroboost.evaluation import _traces as tr

__all__ = ["Draws", "Group", "Variable", "data_dim", "dataset", "dims_of"]

FIXED = ("observed_data", "constant_data")


@dataclass
class Variable:
    """One variable of a group: its values, the names of their dimensions, where the data are."""

    values: Tensor
    dims: list[str]
    data_axis: int | None = None


@dataclass
class Draws:
    """The draws of one variable as they come, with what does not change from draw to draw."""

    dims: list[str]
    data_axis: int | None
    values: list[Tensor] = field(default_factory=list)

    def variable(self) -> Variable:
        return Variable(torch.stack(self.values), self.dims, self.data_axis)


class Group(dict[str, Draws]):
    """Sites of one group, collected over draws."""

    def add(self, name: str, site: tr.Site, where: tr.Layout, value: Tensor | None = None) -> None:
        """Take one draw of a site: its own value, or another of that shape."""
        value = site["value"] if value is None else value
        if name not in self:
            shape, event = tr.batch_shape(site), site["fn"].event_dim
            d = where.dim(site, shape)
            self[name] = Draws(dims_of(name, site), None if d is None else d - event)
        self[name].values.append(value.detach())

    def variables(self) -> dict[str, Variable]:
        return {name: draws.variable() for name, draws in self.items()}


def dims_of(name: str, site: tr.Site) -> list[str]:
    """Name a value's dimensions: by their plates, else by the site and their place."""
    shape, batch = site["value"].shape, len(tr.batch_shape(site))
    frames = {batch + f.dim: f.name for f in site["cond_indep_stack"] if f.vectorized}
    return [frames.get(i, f"{name}_dim_{i}") for i in range(len(shape))]


def data_dim(name: str, site: tr.Site, where: tr.Layout) -> str:
    shape = tr.batch_shape(site)
    d = where.dim(site, shape)
    return dims_of(name, site)[0 if d is None else len(shape) + d]


def _numpy(values: Tensor) -> Any:
    values = values.detach().cpu()
    return values.float().numpy() if values.dtype == torch.bfloat16 else values.numpy()


def dataset(group: str, variables: Mapping[str, Variable], attrs: Mapping[str, str]) -> Any:
    """Build one group; netCDF keeps "/" for its own paths, so names have "." instead."""
    import xarray

    from pyroboost import __version__

    lead = [] if group in FIXED else ["chain", "draw"]
    arrays: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name, variable in variables.items():
        values = _numpy(variable.values)
        dims = [*lead, *(d.replace("/", ".") for d in variable.dims)]
        arrays[name.replace("/", ".")] = (dims, values[None] if lead else values)
        sizes.update(zip(dims, arrays[name.replace("/", ".")][1].shape, strict=True))
    coords = {d: np.arange(size) for d, size in sizes.items()}
    about = {"inference_library": "pyroboost", "inference_library_version": __version__}
    return xarray.Dataset(arrays, coords=coords, attrs={**about, **attrs})
