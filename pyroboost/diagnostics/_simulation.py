"""Parameters and data drawn from a model, and where its arguments hold the data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyroboost.contexts import service
from pyroboost.handlers import is_plate, unobserve
from pyroboost.program import Program

__all__ = ["places", "replaced", "simulate"]


def _run(model: Program, args: Sequence[Any], drawn: Sequence[str]) -> dict[str, Any]:
    with service(model), ExitStack() as stack:
        for name in drawn:
            stack.enter_context(unobserve(name))
        trace = poutine.trace(model).get_trace(*args)
    sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not is_plate(s)}
    return {n: s for n, s in sites.items() if not s["infer"].get("_deterministic")}


def _observed(sites: dict[str, Any]) -> list[str]:
    observed = [n for n, s in sites.items() if s["is_observed"]]
    factors = [n for n in observed if not sites[n]["value"].numel()]
    if factors or not observed:
        what = f"scores {factors[0]!r} by pyro.factor" if factors else "observes nothing"
        raise ValueError(
            f"vsbc: the model {what}, so that no data can be simulated from it; write what it "
            "scores as a sample site with obs=...."
        )
    for name, site in sites.items():
        if bool(torch.as_tensor(site["scale"] != 1).any()):
            raise ValueError(
                f"vsbc: '{name}' is scaled, by a subsampled plate or by poutine.scale; pass all "
                "the data at once, and a model without its scale."
            )
    return observed


def places(model: Program, args: Sequence[Any]) -> dict[str, int]:
    """Find which argument each observed site is."""
    sites = _run(model, args, ())
    found: dict[str, int] = {}
    for name in _observed(sites):
        value = sites[name]["value"]
        same = [i for i, a in enumerate(args) if a is value]
        same = same or [
            i
            for i, a in enumerate(args)
            if isinstance(a, Tensor) and a.shape == value.shape and torch.equal(a, value)
        ]
        if len(same) != 1 or same[0] in found.values():
            raise ValueError(
                f"vsbc: the observed site '{name}' is {len(same)} of the arguments; pass the data "
                "as arguments, or rebuild=... that makes the arguments from simulated sites."
            )
        found[name] = same[0]
    return found


def replaced(args: Sequence[Any], at: dict[str, int], data: dict[str, Tensor]) -> tuple[Any, ...]:
    """Put simulated data in the place of those among the arguments."""
    new = list(args)
    for name, index in at.items():
        new[index] = data[name].to(args[index].dtype)
    return tuple(new)


def simulate(model: Program, args: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw parameters and data from the model; return both by site."""
    observed = _observed(_run(model, args, ()))
    sites = _run(model, args, observed)
    values = {name: site["value"].detach() for name, site in sites.items()}
    return (
        {n: v for n, v in values.items() if n not in observed},
        {n: values[n] for n in observed},
    )
