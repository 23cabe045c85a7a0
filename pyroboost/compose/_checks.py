"""Dry runs of stages: what fits, what is shared, and what must be refused before any number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pyro import poutine
from torch import Tensor

from pyroboost.contexts import forked_rng, service
from pyroboost.handlers import capture, unobserve
from pyroboost.metamodel import MetaModel
from pyroboost.program import Program
from pyroboost.traces import latent_parents

__all__ = ["Plate", "StageFacts", "check_parents", "check_sharing", "dry_run", "label", "misfit"]


def label(index: int, stage: MetaModel) -> str:
    """Return the words by which errors name a stage."""
    return f"stage {index} ({type(stage).__name__})"


class Plate(NamedTuple):
    """A vectorised plate around a site: its name, its dimension and its number of rows."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class StageFacts:
    """What one dry run tells of a stage.

    Args:
        template: zeros in the shape of its visible value.
        hidden: a draw of its hidden value from the prior.
        inferred: a draw of its hidden value from the guide.
        scale: by how much its own plates scale the hidden site.
        plates: all plates of its programs.
        visible_site: the model's visible site.
        hidden_site: the guide's hidden site.
        hidden_plates: the plates around the model's hidden site.
    """

    template: Tensor
    hidden: Tensor
    inferred: Tensor
    scale: float
    plates: frozenset[Plate]
    visible_site: dict[str, Any]
    hidden_site: dict[str, Any]
    hidden_plates: frozenset[Plate]

    @property
    def blank(self) -> Tensor:
        """Zeros in the shape of the visible value, for programs that draw it."""
        return self.template.contiguous()

    def hollow(self) -> StageFacts:
        """Return the facts without values, so that no data are kept alive."""
        template, hidden, inferred = (
            t.new_zeros(()).expand(t.shape) for t in (self.template, self.hidden, self.inferred)
        )
        return replace(
            self,
            template=template,
            hidden=hidden,
            inferred=inferred,
            visible_site={},
            hidden_site={},
        )


def _node(trace: poutine.Trace, site: str, where: str) -> dict[str, Any]:
    if site not in trace.nodes:
        names = ", ".join(n for n in trace.nodes if not n.startswith("_")) or "none"
        raise ValueError(f"Cascade: {where} has no site '{site}'; its sites are {names}.")
    node: dict[str, Any] = trace.nodes[site]
    return node


def _plates(*sites: dict[str, Any]) -> frozenset[Plate]:
    return frozenset(
        Plate(frame.name, frame.dim, frame.size)
        for site in sites
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    )


def _scale_of(site: capture, name: str) -> float:
    if isinstance(site.scale, Tensor) and site.scale.numel() != 1:
        raise ValueError(
            f"Cascade: {name} scales each datum by its own factor (shape "
            f"{tuple(site.scale.shape)}); give the whole cascade the factors by poutine.scale."
        )
    return float(site.scale)


def dry_run(
    stage: MetaModel,
    name: str,
    template: Tensor,
    args: Sequence[Any],
    within: Callable[[], AbstractContextManager[Any]],
) -> StageFacts:
    """Run a stage once from its prior, then its guide on what it drew.

    Args:
        stage: the stage.
        name: how errors name it.
        template: a tensor in the shape of its visible value.  # (N, ...)
        args: its further arguments.
        within: a context in which its programs run.
    """
    with service(stage), forked_rng(), within():
        with poutine.trace() as model, unobserve(stage.visible), capture(stage.hidden) as local:
            stage.model(template, *args)
        visible = _node(model.trace, stage.visible, f"{name}: its model")
        hidden = _node(model.trace, stage.hidden, f"{name}: its model")
        # What the model drew is what its guide expects; a bottom stage that subsamples draws less.
        drawn = visible["value"] if visible["value"].shape == template.shape else template
        with poutine.trace() as guide:
            stage.guide(drawn, *args)
        inferred = _node(guide.trace, stage.hidden, f"{name}: its guide")
    if inferred["value"].shape != hidden["value"].shape:
        raise ValueError(
            f"Cascade: {name}: its guide draws '{stage.hidden}' in shape "
            f"{tuple(inferred['value'].shape)}, its model in {tuple(hidden['value'].shape)}; make "
            "the two agree."
        )
    if visible["value"].shape[1:] != template.shape[1:]:
        raise ValueError(
            f"its model draws '{stage.visible}' in shape {tuple(visible['value'].shape)}"
        )
    return StageFacts(
        template=template,
        hidden=hidden["value"],
        inferred=inferred["value"],
        scale=_scale_of(local, name),
        plates=_plates(*model.trace.nodes.values(), *guide.trace.nodes.values()),
        visible_site=visible,
        hidden_site=inferred,
        hidden_plates=_plates(hidden),
    )


def _kind(site: dict[str, Any]) -> str:
    discrete = getattr(getattr(site["fn"], "support", None), "is_discrete", False)
    return "discrete" if discrete else "continuous"


def misfit(below: StageFacts, stage: StageFacts) -> tuple[str, str] | None:
    """Return what a hidden value is and what the stage above takes, where the two differ."""
    hidden, visible = below.hidden_site, stage.visible_site
    if _kind(hidden) != _kind(visible):
        return f"is {_kind(hidden)}", f"models a {_kind(visible)} one"
    if hidden["fn"].event_dim != visible["fn"].event_dim:
        has, takes = hidden["fn"].event_dim, visible["fn"].event_dim
        return f"has {has} event dimensions", f"models one with {takes} (see .to_event)"
    support = getattr(visible["fn"], "support", None)
    if support is not None and not bool(support.check(below.inferred).all()):
        return "takes values outside of what the other can have", f"models one in {support}"
    return None


def check_parents(stage: MetaModel, name: str, template: Tensor, args: Sequence[Any]) -> None:
    """Refuse a stage below another whose hidden site has latent parents.

    Dropping the density of the fixed site drops the likelihood of its parents with it.
    """
    with service(stage), forked_rng():
        parents = latent_parents(stage.model, stage.hidden, template, *args)
    if parents:
        raise ValueError(
            f"Cascade: the hidden site '{stage.hidden}' of {name} depends on the latent "
            f"{', '.join(map(repr, parents))}, so m(x | h) cannot be had by fixing it; put this "
            "stage on top or take its topmost latent as the hidden site."
        )


def check_sharing(stages: Sequence[MetaModel]) -> None:
    """Refuse stages that share a parameter: training one would silently move the other."""
    owners: dict[Any, int] = {}
    for index, stage in enumerate(stages):
        items: dict[Any, str] = {id(p): n for n, p in stage.named_parameters()}
        for module in stage.modules():
            if isinstance(module, Program):
                items.update({final: n for n, final in module.free.items()})
        for key, parameter in items.items():
            below = owners.setdefault(key, index)
            if below != index:
                raise ValueError(
                    f"Cascade: {label(below, stages[below])} and {label(index, stage)} share the "
                    f"parameter '{parameter}'; rename it or pass copy.deepcopy of one stage."
                )
