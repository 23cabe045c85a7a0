"""Dry runs of stages: what fits, what is shared, and what must be refused before any number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from torch import Tensor

from pyroboost.contexts import forked_rng, service
from pyroboost.handlers import capture, given, is_plate, unobserve
from pyroboost.metamodel import MetaModel
from pyroboost.program import Program

__all__ = ["StageFacts", "check_leading", "check_parents", "check_sharing", "dry_run", "label"]


def label(index: int, stage: MetaModel) -> str:
    """Return the words by which errors name a stage."""
    return f"stage {index} ({type(stage).__name__})"


@dataclass(frozen=True)
class StageFacts:
    """What one dry run tells of a stage.

    Args:
        template: zeros in the shape of its visible value.
        hidden: a draw of its hidden value from the prior.
        scale: by how much its own plates scale the hidden site.
        plates: names of its plates.
        visible_discrete: whether its visible site has a discrete support.
        hidden_discrete: whether its hidden site has one.
    """

    template: Tensor
    hidden: Tensor
    scale: float
    plates: frozenset[str]
    visible_discrete: bool
    hidden_discrete: bool


def _node(trace: poutine.Trace, site: str, where: str) -> dict[str, Any]:
    if site not in trace.nodes:
        names = ", ".join(n for n in trace.nodes if not n.startswith("_")) or "none"
        raise ValueError(f"{where} has no site '{site}'; its sites are {names}.")
    node: dict[str, Any] = trace.nodes[site]
    return node


def _is_discrete(site: dict[str, Any]) -> bool:
    return bool(getattr(getattr(site["fn"], "support", None), "is_discrete", False))


def dry_run(stage: MetaModel, name: str, template: Tensor, args: Sequence[Any]) -> StageFacts:
    """Run a stage once from its prior, then its guide on what it drew."""
    with service(stage), forked_rng():
        with poutine.trace() as seen, unobserve(stage.visible), capture(stage.hidden) as local:
            stage.model(template, *args)
        visible = _node(seen.trace, stage.visible, f"{name}: its model")
        hidden = _node(seen.trace, stage.hidden, f"{name}: its model")
        guide = poutine.trace(stage.guide).get_trace(visible["value"], *args)
        inferred = _node(guide, stage.hidden, f"{name}: its guide")
    if inferred["value"].shape != hidden["value"].shape:
        raise ValueError(
            f"{name}: its guide draws '{stage.hidden}' in shape {tuple(inferred['value'].shape)}, "
            f"its model in {tuple(hidden['value'].shape)}; make the two agree."
        )
    if visible["value"].shape[1:] != template.shape[1:]:
        raise ValueError(
            f"{name}: its model draws '{stage.visible}' in shape {tuple(visible['value'].shape)} "
            f"for data of shape {tuple(template.shape)}; give it the size of its data."
        )
    return StageFacts(
        template=template,
        hidden=hidden["value"],
        scale=float(local.scale),
        plates=frozenset(n for n, s in seen.trace.nodes.items() if s["type"] == "sample" and is_plate(s)),
        visible_discrete=_is_discrete(visible),
        hidden_discrete=_is_discrete(hidden),
    )


def check_parents(stage: MetaModel, name: str, template: Tensor, args: Sequence[Any]) -> None:
    """Refuse a stage below another whose hidden site has latent parents.

    Dropping the density of the fixed site drops the likelihood of its parents with it.
    """
    with service(stage), forked_rng():
        found = get_dependencies(stage.model, (template, *args))["prior_dependencies"]
    parents = sorted(set(found.get(stage.hidden, {})) - {stage.hidden})
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


def _apart_or_together(run: Callable[[Tensor], capture], stack: Tensor) -> tuple[Tensor, Tensor]:
    together = run(stack)
    assert together.msg is not None
    value = together.value
    both: Tensor = together.msg["fn"].log_prob(value)
    apart = []
    for row, drawn in zip(stack, value, strict=True):
        site = run(row)
        assert site.msg is not None
        apart.append(site.msg["fn"].log_prob(drawn))
    return both, torch.stack(apart)


def check_leading(
    stage: MetaModel,
    name: str,
    *,
    template: Tensor,
    args: Sequence[Any],
    visible: Tensor | None = None,
    hidden: Tensor | None = None,
) -> None:
    """Refuse a stage whose programs give other numbers when values carry leading dimensions.

    Vectorised particles and enumeration add dimensions on the left; a program that reads its
    number of data from ``len(x)``, or a batch norm on three dimensions, fails or, worse, does not.

    Args:
        stage: the stage.
        name: how errors name it.
        template: its visible template.  # (N, ...)
        args: its further arguments.
        visible: visible values for its guide.  # (L, N, ...)
        hidden: hidden values for its model.  # (L, N, ...)
    """

    def encode(value: Tensor) -> capture:
        with capture(stage.hidden) as site:
            stage.guide(value, *args)
        return site

    def decode(value: Tensor) -> capture:
        with capture(stage.visible) as site, unobserve(stage.visible):
            given(stage.model, {stage.hidden: value})(template, *args)
        return site

    run, values = (encode, visible) if hidden is None else (decode, hidden)
    assert values is not None
    stack = values[:2] if len(values) > 1 else values.expand(2, *values.shape[1:])
    try:
        with service(stage), forked_rng():
            together, apart = _apart_or_together(run, stack)
        same = together.shape == apart.shape and torch.allclose(together, apart, 1e-3, 1e-3)
    except (RuntimeError, ValueError, IndexError) as error:
        raise _cannot_lead(name, str(error).splitlines()[0]) from error
    if not same:
        raise _cannot_lead(name, "log densities differ from those of the parts")


def _cannot_lead(name: str, reason: str) -> ValueError:
    return ValueError(
        f"Cascade: {name} cannot take values with leading dimensions ({reason}); run particles one "
        "by one (vectorize_particles=False, parallel=False) or count data from the right."
    )
