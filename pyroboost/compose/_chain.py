"""The two programs of a cascade: the model from top to bottom, the guide from bottom to top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from pyro import poutine
from torch import Tensor, nn

from pyroboost.compose._checks import (
    StageFacts,
    check_parents,
    check_sharing,
    dry_run,
    label,
    misfit,
)
from pyroboost.compose._joints import chained, no_copies, shared_plates
from pyroboost.compose._leading import check_leading
from pyroboost.handlers import capture, given, rename, unobserve
from pyroboost.metamodel import MetaModel

__all__ = ["Chain", "ChainProgram"]


def _signature(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return what a dry run may depend on: shapes, and numbers such as an annealing factor."""
    return tuple(
        (v.shape, v.dtype, v.device, v.item() if v.dim() == 0 else None)
        if isinstance(v, Tensor)
        else (type(v), v if isinstance(v, bool | int | float | str) else None)
        for v in values
    )


def _full(value: Tensor, like: Tensor) -> Tensor:
    """Give an enumerated value its rows, which Pyro leaves out: (K, 1) becomes (K, N)."""
    own = like.dim()
    return value.expand(value.shape[: value.dim() - own] + like.shape)


class Chain(nn.Module):
    """The stages of a cascade and the joints between them.

    Args:
        stages: meta-models, bottom first.
        args: for each stage the positions of the further arguments that it takes.
    """

    def __init__(self, stages: Sequence[MetaModel], args: Sequence[tuple[int, ...] | None]) -> None:
        super().__init__()
        check_sharing(stages)
        self.stages = nn.ModuleList(stages)
        self.args = list(args)
        self.visible = stages[0].visible
        self._facts: dict[Any, tuple[list[StageFacts], list[dict[str, str]]]] = {}
        self._led: set[tuple[int, str]] = set()
        for index, (below, stage) in enumerate(pairwise(stages)):
            has, takes = below.hidden_shape, stage.visible_shape
            if has is not None and takes is not None and has != takes:
                raise self._misfit(index, f"has shape {has}", f"takes {takes}")

    def __getitem__(self, index: int) -> MetaModel:
        return cast(MetaModel, self.stages[index])

    def __len__(self) -> int:
        return len(self.stages)

    def label(self, index: int) -> str:
        """Return the words by which errors name a stage."""
        return label(index, self[index])

    def args_of(self, index: int, args: Sequence[Any]) -> tuple[Any, ...]:
        """Return the further arguments of one stage."""
        positions = self.args[index]
        if positions is None:
            return tuple(args) if index == 0 else ()
        if positions and max(positions) >= len(args):
            raise TypeError(
                f"Cascade: {self.label(index)} takes further argument {max(positions)}, and "
                f"{len(args)} came; pass them after the data."
            )
        return tuple(args[p] for p in positions)

    def name(self, index: int, site: str) -> str:
        """Return the name in the cascade of a stage's own site."""
        if site != self[index].visible:
            return f"{index}.{site}"
        return self.visible if index == 0 else f"{index - 1}.{self[index - 1].hidden}"

    def _misfit(self, index: int, has: str, takes: str) -> ValueError:
        return ValueError(
            f"Cascade: {self.label(index)} does not fit under {self.label(index + 1)}: its "
            f"'{self[index].hidden}' {has}, and the stage above {takes}."
        )

    def facts(
        self, x: Tensor, args: Sequence[Any]
    ) -> tuple[list[StageFacts], list[dict[str, str]]]:
        """Return what dry runs tell of each stage for data of this shape, and names of plates."""
        key = _signature((x, *args))
        if key not in self._facts:
            facts = self._dry_runs(x, args)
            if not self._facts:
                check_sharing([self[i] for i in range(len(self))])
                for index, fact in enumerate(facts[:-1]):
                    own = self.args_of(index, args)
                    check_parents(self[index], self.label(index), fact.template, own)
            if len(self._facts) > 64:  # ragged data: shapes without end
                self._facts.clear()
            self._facts[key] = [fact.hollow() for fact in facts], self._plate_names(facts)
        return self._facts[key]

    def _dry_runs(self, x: Tensor, args: Sequence[Any]) -> list[StageFacts]:
        facts: list[StageFacts] = []
        template = x
        for index in range(len(self)):
            names = {plate.name: plate.name for fact in facts[:1] for plate in fact.plates}
            own, within = self.args_of(index, args), self._shared(index, names)
            try:
                fact = dry_run(self[index], self.label(index), template, own, within)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                if index == 0 or reason.startswith("Cascade:"):
                    raise
                has = f"has shape {tuple(template.shape)}"
                raise self._misfit(index - 1, has, f"cannot take it ({reason})") from error
            if facts and (words := misfit(facts[-1], fact)) is not None:
                raise self._misfit(index - 1, *words)
            if facts and fact.scale not in (1.0, facts[0].scale):
                raise ValueError(
                    f"Cascade: {self.label(index)} scales its data by {fact.scale:g} and the "
                    f"bottom stage by {facts[0].scale:g}; use one subsample of one plate."
                )
            facts.append(fact)
            template = torch.zeros_like(fact.hidden)
            self[index].visible_shape = tuple(fact.template.shape[1:])
        return facts

    def _plate_names(self, facts: list[StageFacts]) -> list[dict[str, str]]:
        """Find for each stage the names in the cascade of its plates.

        1. A plate with the dimension and the size of one around the hidden value below is that
           plate, whatever its name: they hold the same independent rows.
        2. A plate that the bottom stage has too, with its size, is that plate.
        3. Any other plate is the stage's own.
        """
        names: list[dict[str, str]] = [{plate.name: plate.name for plate in facts[0].plates}]
        below = {plate: plate.name for plate in facts[0].hidden_plates}
        for index, fact in enumerate(facts[1:], start=1):
            found = {plate.name: f"{index}.{plate.name}" for plate in fact.plates}
            found |= {plate.name: plate.name for plate in fact.plates & facts[0].plates}
            around = {(plate.dim, plate.size): name for plate, name in below.items()}
            places = [(p.name, around.get((p.dim, p.size))) for p in fact.plates]
            found |= {name: known for name, known in places if known is not None}
            names.append(found)
            below = {plate: found[plate.name] for plate in fact.hidden_plates}
        return names

    def _shared(
        self, index: int, names: dict[str, str]
    ) -> Callable[[], AbstractContextManager[Any]]:
        if index == 0:
            return nullcontext
        own = f"{index}."
        shared = {name for name, known in names.items() if not known.startswith(own)}
        return partial(shared_plates, shared, self.label(index))

    def _joint(
        self, index: int, facts: list[StageFacts], plates: list[dict[str, str]]
    ) -> ExitStack:
        """Enter the handlers around one stage, outermost first."""
        stack = ExitStack()
        if index and facts[index].scale != facts[0].scale:
            stack.enter_context(poutine.scale(scale=facts[0].scale))
        own, known = "" if index == 0 else f"{index}.", plates[index]
        names = rename(partial(self.name, index), plates=lambda n: known.get(n, f"{own}{n}"))
        stack.enter_context(names)
        stack.enter_context(self._shared(index, known)())
        return stack

    def _lead(self, index: int, args: Sequence[Any], x: Tensor, **values: Tensor) -> None:
        """Check once that a stage takes leading dimensions, when they come."""
        facts, plates = self.facts(x, args)
        kind, value = next(iter(values.items()))
        own = (facts[index].hidden if kind == "hidden" else facts[index].template).dim()
        if value.dim() <= own or (index, kind) in self._led:
            return
        flat = value.detach().reshape(-1, *value.shape[value.dim() - own :])
        check_leading(
            self[index],
            self.label(index),
            template=facts[index].blank,
            args=self.args_of(index, args),
            within=self._shared(index, plates[index]),
            **{kind: flat},
        )
        self._led.add((index, kind))

    def _same_scale(self, site: capture, facts: list[StageFacts]) -> None:
        if site.seen and float(site.scale) != facts[0].scale:
            raise RuntimeError(
                f"Cascade: {self.label(0)} scales '{self[0].hidden}' by {float(site.scale):g}, and "
                f"by {facts[0].scale:g} when it first ran; pass what the scale depends on as an "
                "argument, so that all stages follow it."
            )

    def run_model(self, x: Tensor, *args: Any, marginal: bool = False) -> None:
        """Draw h_k, ..., h_1 and score x: Eq. 3."""
        facts, plates = self.facts(x, args)
        value: Tensor | None = None
        enumerated: dict[str, int] = {}
        for index in reversed(range(len(self))):
            stage = self[index]
            program: Callable[..., Any] = stage.model
            hidden = capture(stage.hidden)
            if value is not None:
                value = _full(value, facts[index].hidden)
                self._lead(index, args, x, hidden=value)
                program = given(hidden(program), {stage.hidden: value})
            elif marginal and stage.marginal is not None:
                program = stage.marginal
            with self._joint(index, facts, plates), ExitStack() as inner:
                site = inner.enter_context(capture(stage.visible))
                inner.enter_context(no_copies(stage.visible, self.label(index), enumerated))
                if index:
                    inner.enter_context(chained(stage.visible))
                    inner.enter_context(unobserve(stage.visible))
                template = facts[index].blank if index else x
                program(template, *self.args_of(index, args))
            value = site.value
        self._same_scale(hidden, facts)

    def run_guide(self, x: Tensor, *args: Any) -> None:
        """Draw h_1, ..., h_k: Eq. 4."""
        facts, plates = self.facts(x, args)
        value, top = x, len(self) - 1
        for index in range(len(self)):
            stage = self[index]
            if index:
                value = _full(value, facts[index].template)
                self._lead(index, args, x, visible=value)
            program = stage.guide if index == top else stage.recognition
            with self._joint(index, facts, plates), capture(stage.hidden) as site:
                program(value, *self.args_of(index, args))
            if index == 0 and top:
                self._same_scale(site, facts)
            value = site.value


class ChainProgram(nn.Module):
    """One of a chain's programs as a module, so that Pyro's ELBO modules find its parameters."""

    def __init__(self, chain: Chain, which: str) -> None:
        super().__init__()
        self.chain, self.which = chain, which

    def forward(self, x: Tensor, *args: Any) -> None:
        """Run the program."""
        if self.which == "guide":
            self.chain.run_guide(x, *args)
        else:
            self.chain.run_model(x, *args, marginal=self.which == "marginal")
