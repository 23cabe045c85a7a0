"""The programs of a mixture: parts run aside, one component drawn per datum, one visible site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyroboost.compose._laws import Chosen, Component, Union, pick, stacked
from pyroboost.compose._members import check_apart, look, names_of
from pyroboost.compose._refusals import explained
from pyroboost.compose._runs import Draws, Inside, Scored, reach
from pyroboost.compose._sites import Names, Plates, Site, placed
from pyroboost.handlers import capture
from pyroboost.metamodel import MetaModel
from pyroboost.program import Program

__all__ = ["COMPONENT", "Mixing", "MixtureProgram", "Proportions"]

COMPONENT = "component"
_BY_GUIDE = "mixture_guide"  # marks, in a site's `infer`, a component that a guide drew

Hidden = Literal["shared", "component"]


class Proportions(nn.Module):
    """The weights of a mixture: logits that can be trained, and which parts count at all.

    Args:
        num_parts: the number of parts K.
        like: a tensor whose device they are on, and whose dtype they have if it is a float.
    """

    active: Tensor

    def __init__(self, num_parts: int, like: Tensor | None = None) -> None:
        super().__init__()
        device = None if like is None else like.device
        dtype = like.dtype if like is not None and like.is_floating_point() else None
        self.logits = nn.Parameter(torch.zeros(num_parts, dtype=dtype, device=device))
        self.register_buffer("active", torch.ones(num_parts, dtype=torch.bool, device=device))

    def forward(self) -> Tensor:
        """Return the log weights, (K,); minus infinity for a part whose weight is exactly 0."""
        return self.logits.masked_fill(~self.active, -torch.inf).log_softmax(-1)

    @torch.no_grad()
    def assign(self, weights: Tensor) -> None:
        """Set the weights to normalised ones."""
        self.active.copy_(weights > 0)
        self.logits.copy_(weights.clamp_min(torch.finfo(weights.dtype).tiny).log())


@dataclass
class _Drawn:
    """One part's draws aside and the log weight that they have."""

    names: Names
    sites: dict[str, Site]
    log_weight: Tensor
    score: Tensor | float
    choices: Tensor | float


def _possible(terms: Tensor, log_weights: Tensor) -> Tensor:
    """Put the weights in place of terms that are all minus infinity: the datum cannot occur."""
    nowhere = (terms == -torch.inf).all(-1, keepdim=True)
    return torch.where(nowhere, log_weights, terms)


def _same_value(change: Tensor | float) -> Tensor | float:
    """Keep the gradient of a term and take its value away."""
    return change - change.detach() if isinstance(change, Tensor) else 0.0


class Mixing(nn.Module):
    """The parts of a mixture and what joins them.

    Args:
        parts: meta-models over one visible space.
        hidden: ``"shared"`` where they share the hidden site as well, else ``"component"``.
        proportions: a program that gives the log weights.
    """

    def __init__(self, parts: Sequence[MetaModel], hidden: Hidden, proportions: Program) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.proportions = proportions
        self.kind = hidden
        self.visible = parts[0].visible
        self.hidden = parts[0].hidden if hidden == "shared" else COMPONENT
        self._names: list[Names] | None = None

    def __getitem__(self, index: int) -> MetaModel:
        return cast(MetaModel, self.parts[index])

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[MetaModel]:
        return (cast(MetaModel, part) for part in self.parts)

    def names(self, x: Tensor, args: Sequence[Any]) -> list[Names]:
        """Return the names of all parts' sites and plates; the first call checks the parts."""
        if self._names is None:
            with explained(list(self), x):
                members = [look(i, part, x, args) for i, part in enumerate(self)]
            check_apart(list(self))  # free params are known by now
            self._names = names_of(members, self.kind)
            for part in self:
                part.visible_shape = tuple(x.shape[1:])
        return self._names

    # The model

    def run_model(self, x: Tensor, *args: Any) -> None:
        """Draw h, then the component, then x from it."""
        names, rows = self.names(x, args), dict[str, Any]()
        log_weights = self.proportions()
        if self.kind == "shared":
            h, (index, alone) = self._draw_shared(names, rows, log_weights, x, args)
        else:
            first = reach(self[0].model, names[0], rows, self[0].hidden, x, *args)
            law = dist.Categorical(logits=log_weights)
            h, (index, alone) = None, self._draw_component(first, names[0], law)
        sites = []
        for part, own in zip(self, names, strict=True):
            shared = None if h is None else (part.hidden, h)
            inside = Inside(own, part.visible, shared, mask=index == own.index, alone=alone)
            with Plates(own, rows), inside:
                part.model(x, *args)
            sites.append(self._visible_of(inside))
        self._emit(sites, Chosen(index, [site.fn for site in sites]))

    def _draw_shared(
        self,
        names: list[Names],
        rows: dict[str, Any],
        log_weights: Tensor,
        x: Tensor,
        args: tuple[Any, ...],
    ) -> tuple[Tensor, tuple[Tensor, bool]]:
        sites = [
            reach(part.model, own, rows, part.hidden, x, *args)
            for part, own in zip(self, names, strict=True)
        ]
        with placed(sites[0]):
            h = pyro.sample(self.hidden, Union(log_weights, [site.fn for site in sites]))
        own = [n.per_datum(s, s.log_prob(h)) for n, s in zip(names, sites, strict=True)]
        terms = stacked(own) + log_weights
        law = dist.Categorical(logits=_possible(terms, log_weights))
        return h, self._draw_component(sites[0], names[0], law)

    def _draw_component(
        self, site: Site, names: Names, law: Any, *, in_guide: bool = False
    ) -> tuple[Tensor, bool]:
        """Draw the component in the plate over data; say whether the model alone enumerates it."""
        (frame,) = (f for f in site.frames if f.dim == names.data_dim)
        scale = 1.0 if frame.size == -1 else (frame.full_size or frame.size) / frame.size
        where = Site(COMPONENT, law, (frame,), scale, None, False, {})
        with placed(where), capture(COMPONENT) as drawn:
            index: Tensor = pyro.sample(COMPONENT, law, infer={_BY_GUIDE: in_guide})
        assert drawn.msg is not None
        found = drawn.msg["infer"]  # the guide's own, where the value is the guide's
        return index, found.get("_enumerate_dim") is not None and not found.get(_BY_GUIDE)

    def _visible_of(self, inside: Inside) -> Site:
        if inside.site is None:
            raise ValueError(
                f"Mixture: the model of part {inside.names.index} has no site "
                f"'{inside.visible}'; check its name."
            )
        return inside.site

    def _emit(self, sites: list[Site], law: Any) -> None:
        first = sites[0]
        with placed(first):
            pyro.sample(self.visible, law, obs=first.value if first.observed else None)

    def run_marginal(self, x: Tensor, *args: Any) -> None:
        """Draw x with hidden sites and component summed out."""
        names, rows, sites = self.names(x, args), dict[str, Any](), []
        for part, own in zip(self, names, strict=True):
            inside = Inside(own, part.visible)
            program = part.marginal
            assert program is not None
            with Plates(own, rows), inside:
                program(x, *args)
            sites.append(self._visible_of(inside))
        self._emit(sites, Union(self.proportions(), [site.fn for site in sites]))

    # The guide

    def run_guide(self, x: Tensor, *args: Any, recognition: bool = False) -> None:
        """Draw from all parts' guides aside, then the component, and keep its draws."""
        names, rows = self.names(x, args), dict[str, Any]()
        log_weights = self.proportions()
        drawn = []
        for part, own in zip(self, names, strict=True):
            program = part.recognition if recognition else part.guide
            drawn.append(self._draw_aside(part, own, rows, program, x, args))
        terms = _possible(stacked([d.log_weight for d in drawn]) + log_weights, log_weights)
        score = _same_value(sum(d.score for d in drawn))
        choices = sum(d.choices for d in drawn)
        first = drawn[0].sites[self[0].hidden]
        law = Component(terms, score, choices, enumerable=self.kind == "component")
        index, _ = self._draw_component(first, names[0], law, in_guide=True)
        kept = set[str]()
        if self.kind == "shared":
            sites = [d.sites[part.hidden] for d, part in zip(drawn, self, strict=True)]
            laws = [site.fn for site in sites]
            value = pick(index, [site.value for site in sites], first.fn.event_dim)
            with placed(first):
                pyro.sample(self.hidden, Chosen(index, laws, value))
            kept = {part.hidden for part in self}
        self._record(drawn, index, kept)

    def _draw_aside(
        self,
        part: MetaModel,
        names: Names,
        rows: dict[str, Any],
        program: Callable[..., Any],
        x: Tensor,
        args: tuple[Any, ...],
    ) -> _Drawn:
        draws = Draws(names)
        with Plates(names, rows), draws:
            program(x, *args)
        scored = Scored(names, draws.sites, part.visible)
        with poutine.block(), Plates(names, rows, quiet=True), scored:
            part.model(x, *args)
        total: Any = scored.total
        score: Tensor | float = 0.0
        choices: Tensor | float = 0.0
        for site in draws.sites.values():
            if site.deterministic:
                continue
            auxiliary = site.observed or site.infer.get("is_auxiliary")
            if site.name not in scored.met and not auxiliary:
                raise ValueError(
                    f"Mixture: the guide of part {names.index} draws '{site.name}', which its "
                    "model does not have; remove it or add it to the model."
                )
            parts = site.fn.score_parts(site.value)
            total = total - names.per_datum(site, site.masked(parts.log_prob))
            if site.observed or not isinstance(parts.score_function, Tensor):
                continue
            score = score + names.per_datum(site, site.masked(parts.score_function))
            if isinstance(site.fn, Component):
                choices = choices + names.per_datum(site, site.fn.choice(parts.log_prob))
        return _Drawn(names, draws.sites, total, score, choices)

    def _record(self, drawn: list[_Drawn], index: Tensor, but: set[str]) -> None:
        """Say the draws of all parts, each scored where its part is the component."""
        for part, found in zip(self, drawn, strict=True):
            for site in found.sites.values():
                if site.deterministic or (site.name in but and site.name == part.hidden):
                    continue
                own = {k: v for k, v in site.infer.items() if k == "is_auxiliary"}
                with placed(site, mask=index == found.names.index):
                    if site.observed:
                        pyro.sample(found.names.site(site.name), site.fn, obs=site.value)
                    else:
                        law = Chosen(index.new_zeros(()), [site.fn], site.value)
                        pyro.sample(found.names.site(site.name), law, infer=own)


class MixtureProgram(nn.Module):
    """One of a mixture's programs as a module, so that Pyro's ELBO modules find its parameters."""

    def __init__(self, mixing: Mixing, which: str) -> None:
        super().__init__()
        self.mixing, self.which = mixing, which

    def forward(self, x: Tensor, *args: Any) -> None:
        """Run the program."""
        with explained(list(self.mixing), x):
            if self.which == "model":
                self.mixing.run_model(x, *args)
            elif self.which == "marginal":
                self.mixing.run_marginal(x, *args)
            else:
                self.mixing.run_guide(x, *args, recognition=self.which == "recognition")
