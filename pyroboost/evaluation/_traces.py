"""Paired traces of guide and model, and where in each site the data are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyroboost.contexts import service
from pyroboost.handlers import is_plate, unobserve
from pyroboost.likelihood import Kind
from pyroboost.metamodel import MetaModel
from pyroboost.program import Program

__all__ = ["Layout", "Pair", "Subject", "Traced", "draw_prior", "layout", "subject", "traced"]

Pair = MetaModel | tuple[Callable[..., Any], Callable[..., Any]]
Site = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A pair as it is judged: two programs, the modules to put in eval mode, what x is called."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    modules: tuple[nn.Module, ...]
    visible: str
    pair: MetaModel | None
    source: Callable[..., Any]

    @property
    def name(self) -> str:
        """How errors name it."""
        return "(model, guide)" if self.pair is None else type(self.pair).__name__

    def normalisation(self) -> tuple[Kind, float]:
        """Return how sure its densities are of their constant."""
        return ("exact", 0.0) if self.pair is None else self.pair.normalisation()


class Traced(NamedTuple):
    """One run: the random sites of the model, of the guide, and the model's computed values."""

    model: dict[str, Site]
    guide: dict[str, Site]
    computed: dict[str, Site]

    @property
    def scored(self) -> list[str]:
        """The sites that count in log p: what is observed and what the guide draws."""
        return [n for n, s in self.model.items() if s["is_observed"] or n in self.guide]

    @property
    def observed(self) -> list[str]:
        """The observed sites that have a value; ``pyro.factor`` has none."""
        return [n for n, s in self.model.items() if s["is_observed"] and s["value"].numel()]

    @property
    def latent(self) -> list[str]:
        """The latent sites, those that the guide leaves to the prior included."""
        return [n for n, s in self.model.items() if not s["is_observed"]]


@dataclass(frozen=True)
class Layout:
    """Where the data are.

    Args:
        num_data: how many there are, N.
        plate: the plate that holds them; ``None``: whatever dimension has their size.
        separate: whether every site has one log density per datum.
    """

    num_data: int
    plate: str | None
    separate: bool

    def dim(self, site: Site, shape: Sequence[int]) -> int | None:
        """Return the batch dimension of the data, counted from the right, if there is one."""

        def fits(d: int) -> bool:
            return -d <= len(shape) and shape[d] == self.num_data

        frames = [f for f in site["cond_indep_stack"] if f.vectorized]
        if self.plate is not None:
            dims = [f.dim for f in frames if f.name == self.plate and fits(f.dim)]
        else:
            dims = [f.dim for f in frames if fits(f.dim)]
            dims = dims or [d for d in range(-len(shape), 0) if fits(d)]
        return min(dims) if dims else None

    def reduce(self, site: Site) -> Tensor:
        """Sum a site's log density to one per datum, (N,), or to a number where data share it."""
        log_prob: Tensor = site["unscaled_log_prob"]
        if site["mask"] is not None:
            on = torch.as_tensor(site["mask"], device=log_prob.device)
            log_prob = torch.where(on, log_prob, log_prob.new_zeros(()))
        d = self.dim(site, log_prob.shape)
        if d is None:
            return log_prob.sum()
        return log_prob.movedim(d, 0).reshape(self.num_data, -1).sum(-1)

    def total(self, sites: dict[str, Site], names: Sequence[str]) -> Tensor:
        """Add the log densities of some sites: (N,) where data are separate, else a number."""
        terms = [self.reduce(sites[name]) for name in names]
        return torch.stack([t if self.separate else t.sum() for t in terms]).sum(0)


def batch_shape(site: Site) -> tuple[int, ...]:
    """Return the shape of a site's value without the dimensions of one event."""
    value = site["value"]
    return tuple(value.shape[: value.dim() - site["fn"].event_dim])


def _random(trace: poutine.Trace) -> dict[str, Site]:
    sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not is_plate(s)}
    return {n: s for n, s in sites.items() if not s["infer"].get("_deterministic")}


def subject(pair: Pair, args: Sequence[Any], visible: str | None, where: str) -> Subject:
    """Read a meta-model or a (model, guide), whose visible site is found by running them."""
    if isinstance(pair, MetaModel):
        return Subject(pair.model, pair.guide, (pair,), pair.visible, pair, pair.model)
    if not (isinstance(pair, tuple) and len(pair) == 2):
        raise TypeError(
            f"{where}: got {type(pair).__name__}; pass a meta-model or a tuple (model, guide)."
        )
    model, guide = Program(pair[0], "model"), Program(pair[1], "guide")
    found = Subject(model, guide, (model, guide), visible or "", None, pair[0])
    observed = next(traced(found, args, 1)).observed
    if visible is None and len(observed) == 1:
        visible = observed[0]
    if visible not in observed:
        names = ", ".join(map(repr, observed)) or "none"
        raise ValueError(
            f"{where}: the model observes {names}; name the site of the data, visible=..., and "
            "condition the model on them."
        )
    return Subject(model, guide, (model, guide), visible, None, pair[0])


def traced(item: Subject, args: Sequence[Any], num_samples: int) -> Iterator[Traced]:
    """Run the guide and the model after it, in eval mode without gradients; densities computed."""
    for index in range(num_samples):
        with service(*item.modules):
            guide = poutine.trace(item.guide).get_trace(*args)
            model = poutine.trace(poutine.replay(item.model, trace=guide)).get_trace(*args)
            sites, inferred = _random(model), _random(guide)
            computed = {
                n: s for n, s in model.nodes.items() if s.get("infer", {}).get("_deterministic")
            }
            run = Traced(sites, inferred, computed)
            if index == 0:
                _check(item, run)
            wanted = set(run.scored)
            model.compute_log_prob(lambda name, _, wanted=wanted: name in wanted)
            guide.compute_log_prob(lambda name, _, wanted=inferred: name in wanted)
        yield run


def draw_prior(item: Subject, args: Sequence[Any]) -> tuple[dict[str, Site], dict[str, Site]]:
    """Run the model once with its visible site drawn; return random and computed sites."""
    with service(*item.modules), unobserve(item.visible):
        trace = poutine.trace(item.model).get_trace(*args)
    computed = {n: s for n, s in trace.nodes.items() if s.get("infer", {}).get("_deterministic")}
    return _random(trace), computed


def _base(fn: Any) -> Any:
    while hasattr(fn, "base_dist") and not isinstance(fn, dist.Delta):
        fn = fn.base_dist
    return fn


def _check(item: Subject, run: Traced) -> None:
    """Refuse a guide that has no density to weigh by."""
    auxiliary = {n for n, s in run.guide.items() if s["infer"].get("is_auxiliary")}
    for name, site in run.guide.items():
        if name in auxiliary or site["is_observed"]:
            continue
        if name not in run.model:
            raise ValueError(
                f"{item.name}: the guide draws '{name}', which the model does not have; remove it "
                "or add it to the model."
            )
        _check_mask(item, name, run.model[name]["mask"], site["mask"])
        fn, support = _base(site["fn"]), getattr(run.model[name]["fn"], "support", None)
        if auxiliary or not isinstance(fn, dist.Delta) or getattr(support, "is_discrete", False):
            continue
        if not bool(torch.as_tensor(fn.log_density).any()):
            raise ValueError(
                f"{item.name}: the guide gives '{name}' one value and no density, so its draws "
                "cannot be weighed; use a guide with a spread, such as AutoNormal."
            )


def _check_mask(item: Subject, name: str, ours: Any, theirs: Any) -> None:
    """Refuse a value that the guide scores and the model does not: its weight has no bound."""
    off = torch.zeros(()) if ours is None else ~torch.as_tensor(ours, dtype=torch.bool)
    on = torch.ones(()) if theirs is None else torch.as_tensor(theirs, dtype=torch.bool)
    if bool((off.bool() & on.bool()).any()):
        raise ValueError(
            f"{item.name}: the model masks '{name}' where the guide scores it, so that no weight "
            "or evidence of it means anything; mask the guide's site too, or the observed site "
            "alone (within poutine.mask, in place of obs_mask=)."
        )


def layout(item: Subject, run: Traced, args: Sequence[Any]) -> Layout:
    """Find the data: the first dimension of x by contract, else the outermost plate around it."""
    site = run.model[item.visible]
    if item.pair is not None:
        return Layout(len(args[0]), None, True)
    frames = [f for f in site["cond_indep_stack"] if f.vectorized]
    shape = batch_shape(site)
    if frames:
        found = Layout(shape[frames[0].dim], frames[0].name, False)
    else:
        found = Layout(shape[0] if shape else 1, None, False)
    sites = [run.model[n] for n in dict.fromkeys((*run.scored, *run.latent))]
    separate = bool(run.guide) and all(
        found.dim(s, batch_shape(s)) is not None for s in (*sites, *run.guide.values())
    )
    if not separate and any(
        torch.as_tensor(s["scale"] != 1).any() for s in (*sites, *run.guide.values())
    ):
        raise ValueError(
            f"{item.name}: densities are scaled, by a subsampled plate or by poutine.scale, while "
            "data share hidden values; pass all the data at once, and judge the model without its "
            "scale."
        )
    return Layout(found.num_data, found.plate, separate)
