"""The draws of a report as sets to be drawn, and as groups of ArviZ's container."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroboost import _arviz
from pyroboost.diagnostics._draws import Collected
from pyroboost.diagnostics._reference import Reference
from pyroboost.evaluation._groups import Variable, dataset
from pyroboost.evaluation.posterior import Estimate
from pyroboost.sampling.psis import psis, psis_resample

__all__ = ["container", "sets"]


def sets(drawn: Collected, reference: Reference | None) -> dict[str, dict[str, Tensor]]:
    """Return draws by set and site: of the guide, weighted, and of the reference.  # (S, ...)."""
    found = {"guide": drawn.latent_values(), "guide, weighted": _weighted(drawn)}
    if reference is not None:
        values = reference.draws
        found["reference"] = {n: v for n, v in values.items() if n in found["guide"]}
    return found


def _weighted(drawn: Collected) -> dict[str, Tensor]:
    """Resample the latent sites by smoothed weights, each datum by its own where it has some."""
    chosen, found = psis_resample(drawn.log_weights), {}
    for name in drawn.latent:
        values = drawn.values(name)
        if drawn.where.separate:
            rows = torch.arange(values.shape[1], device=values.device)
            axis = drawn.sites[name].data_axis
            assert axis is not None
            found[name] = values[chosen, rows].movedim(1, axis)
        else:
            found[name] = values[chosen[:, 0]]
    return found


def container(
    drawn: Collected, reference: Reference | None, bounds: Mapping[str, Estimate | None]
) -> Any:
    """Return ArviZ's container of draws, weights and reference."""
    axis = -1 if drawn.where.separate else None
    smoothed = psis(drawn.log_weights).log_weights.reshape(drawn.log_p.shape)
    stats = {
        "log_p": drawn.log_p,
        "log_q": drawn.log_q,
        "log_weight": drawn.log_p - drawn.log_q,
        "log_psis_weight": smoothed,
    }
    attrs = {name: str(value) for name, value in bounds.items() if value is not None}
    variables = {name: Variable(v, drawn.dims, axis) for name, v in stats.items()}
    groups = {
        "posterior": dataset("posterior", drawn.sites, {}),
        "sample_stats": dataset("sample_stats", variables, attrs),
    }
    if reference is not None:
        groups["reference"] = _chains(drawn, reference)
    return _arviz.container(groups)


def _chains(drawn: Collected, reference: Reference) -> Any:
    import xarray

    dims = {
        name: drawn.sites[name].dims
        if name in drawn.sites
        else [f"{name}_dim_{i}" for i in range(value.dim() - 2)]
        for name, value in reference.chains.items()
    }
    chains = [
        dataset(
            "reference", {n: Variable(v[c], dims[n]) for n, v in reference.chains.items()}, {}
        ).assign_coords(chain=[c])
        for c in range(len(next(iter(reference.chains.values()))))
    ]
    return xarray.concat(chains, dim="chain")
