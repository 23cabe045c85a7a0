"""What a mixture asks of its parts: one visible space, one plate over data, own parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from torch import Tensor

from pyroboost.compose._sites import Names
from pyroboost.contexts import forked_rng, service
from pyroboost.handlers import capture, unobserve
from pyroboost.metamodel import MetaModel
from pyroboost.program import Program
from pyroboost.traces import latent_parents

__all__ = ["can_share", "check_apart", "check_parts", "label", "look", "names_of"]


def label(index: int, part: MetaModel) -> str:
    """Return the words by which errors name a part."""
    return f"part {index} ({type(part).__name__})"


@dataclass(frozen=True)
class Member:
    """What one dry run tells of a part; sites without their values."""

    name: str
    visible: Any
    hidden: Any
    frames: tuple[Any, ...]
    scales: tuple[float, float]
    parents: tuple[str, ...]

    @property
    def data_frame(self) -> Any:
        """The plate over data: the outermost around the visible site."""
        return min((f for f in self.visible["frames"]), key=lambda f: f.dim)


def support_of(law: Any) -> str:
    """Return the support of a law in words that are equal for equal supports."""
    support: Any = getattr(law, "support", None)
    while type(support).__name__ == "MixtureSameFamilyConstraint":
        support = support.base_constraint
    return str(support)


def _shape(site: Any) -> dict[str, Any]:
    frames = [f for f in site["cond_indep_stack"] if f.vectorized]
    law, value = site["fn"], site["value"]
    event = tuple(value.shape[value.dim() - law.event_dim :])
    return {"frames": frames, "event": event, "support": support_of(law), "rows": value.shape}


def _scale(site: Any, name: str) -> float:
    scale = site["scale"]
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(
            f"Mixture: {name} scales each datum by its own factor at '{site['name']}'; give the "
            "whole mixture the factors by poutine.scale."
        )
    return float(scale)


def look(index: int, part: MetaModel, x: Tensor, args: Sequence[Any]) -> Member:
    """Run a part once from its prior, then its guide, and read off what a mixture needs."""
    name = label(index, part)
    with service(part), forked_rng():
        with unobserve(part.visible):
            model = poutine.trace(part.model).get_trace(x, *args)
        guide = poutine.trace(part.guide).get_trace(x, *args)
        parents = latent_parents(part.model, part.hidden, x, *args)
    for site, trace, owner in (
        (part.visible, model, "model"),
        (part.hidden, model, "model"),
        (part.hidden, guide, "guide"),
    ):
        if site not in trace.nodes:
            raise ValueError(
                f"Mixture: the {owner} of {name} has no site '{site}'; check its name."
            )
        if not any(f.vectorized for f in trace.nodes[site]["cond_indep_stack"]):
            raise ValueError(
                f"Mixture: '{site}' of {name} is in no plate; put it in a plate over the data, "
                "since a component is drawn for each datum."
            )
    visible, hidden = model.nodes[part.visible], model.nodes[part.hidden]
    nodes = [*model.nodes.values(), *guide.nodes.values()]
    found = (f for n in nodes if n["type"] == "sample" for f in n["cond_indep_stack"])
    return Member(
        name=name,
        visible=_shape(visible),
        hidden=_shape(hidden),
        frames=tuple(dict.fromkeys(found)),
        scales=(_scale(visible, name), _scale(hidden, name)),
        parents=tuple(parents),
    )


def names_of(members: Sequence[Member], kind: str) -> list[Names]:
    """Check that the parts fit together and find the names of their sites and plates.

    A plate of the dimension and the size of one of the first part's is that plate, whatever its
    name: they hold the same independent rows. Any other plate is the part's own.
    """
    first = members[0]
    for member in members:
        _check_fit(first, member, kind)
    known: dict[tuple[Any, ...], str] = {}
    for frame in first.frames:
        known.setdefault((frame.dim, frame.size, frame.full_size), frame.name)
    known[(first.data_frame.dim, first.data_frame.size, first.data_frame.full_size)] = (
        first.data_frame.name
    )
    names = []
    for index, member in enumerate(members):
        found = ((f.name, known.get((f.dim, f.size, f.full_size))) for f in member.frames)
        plates = {own: name for own, name in found if name is not None}
        names.append(Names(index, plates, first.data_frame.dim))
    return names


def _check_fit(first: Member, member: Member, kind: str) -> None:
    frames = first.data_frame, member.data_frame
    if frames[0]._replace(name="") != frames[1]._replace(name=""):
        raise ValueError(
            f"Mixture: {first.name} has its data in dimension {frames[0].dim} with "
            f"{frames[0].size} rows, {member.name} in dimension {frames[1].dim} with "
            f"{frames[1].size}; use plates over data of one dimension and one size."
        )
    rows = [(s["event"], s["support"]) for s in (first.visible, member.visible)]
    if rows[0] != rows[1] or first.visible["rows"] != member.visible["rows"]:
        raise ValueError(
            f"Mixture: {first.name} models values of shape {tuple(first.visible['rows'])} in "
            f"{rows[0][1]} and {member.name} of shape {tuple(member.visible['rows'])} in "
            f"{rows[1][1]}; parts of a mixture have one visible space."
        )
    if first.scales[0] != member.scales[0]:
        raise ValueError(
            f"Mixture: {first.name} scales its data by {first.scales[0]:g} and {member.name} by "
            f"{member.scales[0]:g}; use one subsample of one plate and one scale."
        )
    if kind == "shared":
        _check_shared(first, member)


def _check_shared(first: Member, member: Member) -> None:
    keys = [(m.hidden["event"], m.hidden["support"], m.hidden["rows"]) for m in (first, member)]
    if keys[0] != keys[1] or first.scales[1] != member.scales[1]:
        raise ValueError(
            f"Mixture: the hidden values of {first.name} have shape {tuple(keys[0][2])} in "
            f"{keys[0][1]} and those of {member.name} {tuple(keys[1][2])} in {keys[1][1]}, at "
            f"scales {first.scales[1]:g} and {member.scales[1]:g}; parts that cannot share a "
            "hidden site take hidden='component'."
        )
    if member.parents:
        raise ValueError(
            f"Mixture: the hidden site of {member.name} depends on the latent "
            f"{', '.join(map(repr, member.parents))}, so that its own density is not known; pass "
            "hidden='component' or take its topmost latent as the hidden site."
        )


def can_share(parts: Sequence[MetaModel]) -> bool:
    """Tell whether hidden values of all parts are of one space, as far as they say so.

    Labels of different clusterings have one shape and mean different things: values without a
    dimension are not shared unless that is asked for.
    """
    shapes = {part.hidden_shape for part in parts}
    if len(shapes) > 1 or shapes <= {None, ()}:
        return False
    return len({_hidden_support(part) for part in parts}) == 1


def _hidden_support(part: MetaModel) -> str | None:
    """Return the support of a part's hidden site where it can be seen without data."""
    if part.visible_shape is None:
        return None
    try:
        with service(part), forked_rng(), unobserve(part.visible), capture(part.hidden) as site:
            part.model(part.template(1))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None  # the first run with data tells, in words
    return None if site.msg is None else support_of(site.msg["fn"])


def check_apart(parts: Sequence[MetaModel]) -> None:
    """Refuse parts that share a parameter: training one would silently move the other."""
    owners: dict[Any, int] = {}
    for index, part in enumerate(parts):
        items: dict[Any, str] = {id(p): n for n, p in part.named_parameters()}
        for module in part.modules():
            if isinstance(module, Program):
                items.update({final: n for n, final in module.free.items()})
        for key, parameter in items.items():
            other = owners.setdefault(key, index)
            if other != index:
                raise ValueError(
                    f"Mixture: {label(other, parts[other])} and {label(index, part)} share the "
                    f"parameter '{parameter}'; rename it or pass copy.deepcopy of one part."
                )


def check_parts(parts: Sequence[MetaModel]) -> None:
    """Refuse what can be seen without data: no parts, energies, sharing, other shapes."""
    if not parts:
        raise ValueError("Mixture: there is no part; pass at least one meta-model.")
    for index, part in enumerate(parts):
        if not isinstance(part, MetaModel):
            raise TypeError(
                f"Mixture: part {index} is {type(part).__name__}, not a meta-model; wrap the pair "
                "in MetaModel(model, guide, visible=..., hidden=...)."
            )
        if not part.is_program or part.normalisation()[0] == "unnormalised":
            raise TypeError(
                f"Mixture: {label(index, part)} is an energy without its log Z, so its weight in a "
                "sum would mean nothing; use its closed_form() where there is one."
            )
    check_apart(parts)
    shapes = {p.visible_shape for p in parts if p.visible_shape is not None}
    if len(shapes) > 1:
        raise ValueError(
            f"Mixture: the parts model data of the shapes {sorted(shapes)}; parts of a mixture "
            "have one visible space."
        )
