"""Draws of a guide with their densities, and programs run at values from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyroboost.evaluation import _traces as tr
from pyroboost.evaluation._groups import Draws, Group, Variable, data_dim
from pyroboost.evaluation._together import runs
from pyroboost.handlers import is_plate
from pyroboost.program import Program

__all__ = ["Collected", "collect", "columns", "draw_guide", "gather", "read"]


@dataclass(frozen=True)
class Collected:
    """Draws of a guide: values of the model's latent and computed sites, and log densities.

    Args:
        item: the pair.
        where: where the data are.
        sites: values by site.  # (S, ...)
        latent: the sites that are drawn, not computed.
        log_p: joint log densities.  # (S,), or (S, N) where data are separate
        log_q: log densities of the guide, likewise.
        dims: names of the dimensions of log densities after the first.
    """

    item: tr.Subject
    where: tr.Layout
    sites: dict[str, Variable]
    latent: tuple[str, ...]
    log_p: Tensor
    log_q: Tensor
    dims: list[str]

    @property
    def log_weights(self) -> Tensor:
        """Log weights, (S, N); N is 1 where data share hidden values."""
        table = self.log_p - self.log_q
        return table.reshape(len(table), -1)

    def values(self, name: str) -> Tensor:
        """Return a site's draws; where data are separate, data come second.  # (S, N, ...)."""
        site = self.sites[name]
        if not self.where.separate:
            return site.values
        if site.data_axis is None:
            raise ValueError(
                f"{self.item.name}: '{name}' has no dimension of the data, while every datum has "
                "its own weights; ask for other sites."
            )
        return site.values.movedim(site.data_axis, 1)

    def back(self, name: str, values: Tensor) -> Tensor:
        """Put the data's dimension, the first one, where the site has it."""
        axis = self.sites[name].data_axis
        return values if not self.where.separate or axis is None else values.movedim(0, axis)

    def latent_values(self) -> dict[str, Tensor]:
        """Draws of the latent sites as they are.  # (S, ...)."""
        return {name: self.sites[name].values for name in self.latent}


def read(pair: tr.Pair, args: Sequence[Any], visible: str | None, where: str) -> tr.Subject:
    """Read a pair; a posterior needs no observed site, and which of several does not matter."""
    if isinstance(pair, tuple) and len(pair) == 2 and visible is None:
        programs = Program(pair[0], "model"), Program(pair[1], "guide")
        item = tr.Subject(*programs, programs, "", None, pair[0])
        observed = next(tr.traced(item, args, 1)).observed
        return replace(item, visible=observed[0] if observed else "")
    return tr.subject(pair, args, visible, where)


def collect(item: tr.Subject, args: Sequence[Any], count: int) -> Collected:
    """Run the guide, and the model after it, S times."""
    if count < 1:
        raise ValueError(f"{item.name}: num_samples is {count}; ask for at least one draw.")
    return gather(item, args, runs(item, args, count))


def gather(item: tr.Subject, args: Sequence[Any], runs: Iterable[tr.Traced]) -> Collected:
    """Collect runs, one draw each."""
    group, log_p, log_q = Group(), Draws([], None), Draws([], None)
    where: tr.Layout | None = None
    latent: tuple[str, ...] = ()
    dims: list[str] = []
    for run in runs:
        if where is None:
            where = tr.layout(item, run, args) if item.visible else tr.Layout(1, None, False)
            latent = tuple(run.latent)
            if where.separate:
                dims = [data_dim(item.visible, run.model[item.visible], where)]
        for name in run.latent:
            group.add(name, run.model[name], where)
        for name, site in run.computed.items():
            group.add(name, site, where)
        log_p.values.append(where.total(run.model, run.scored))
        log_q.values.append(where.total(run.guide, list(run.guide)))
    assert where is not None
    p, q = log_p.variable().values, log_q.variable().values
    return Collected(item, where, group.variables(), latent, p, q, dims)


def draw_guide(guide: Callable[..., Any], args: Sequence[Any], count: int) -> dict[str, Tensor]:
    """Draw from a guide alone, in eval mode: the sites that are not auxiliary.  # (S, ...)."""
    from pyro import poutine

    from pyroboost.contexts import service

    program = guide if isinstance(guide, Program) else Program(guide, "guide")
    found: dict[str, list[Tensor]] = {}
    for _ in range(count):
        with service(program):
            trace = poutine.trace(program).get_trace(*args)
        for name, site in trace.nodes.items():
            kept = site["type"] == "sample" and not is_plate(site) and not site["is_observed"]
            if kept and not site["infer"].get("is_auxiliary"):
                found.setdefault(name, []).append(site["value"].detach())
    return {name: torch.stack(values) for name, values in found.items()}


def columns(values: Mapping[str, Tensor]) -> tuple[Tensor, list[str]]:
    """Lay draws side by side as one table with a name for each coordinate.

    Args:
        values: draws by site.  # (S, ...)

    Returns:
        The table in double precision on the CPU, (S, D), and D names such as ``theta[2]``.
    """
    parts, names = [], []
    for name, draws in values.items():
        shape = draws.shape[1:]
        parts.append(draws.detach().to("cpu", torch.float64).reshape(len(draws), -1))
        for flat in range(parts[-1].shape[1]):
            index = []
            for size in reversed(shape):
                index.append(flat % size)
                flat //= size
            label = ",".join(str(i) for i in reversed(index))
            names.append(f"{name}[{label}]" if shape else name)
    return torch.cat(parts, 1), names
