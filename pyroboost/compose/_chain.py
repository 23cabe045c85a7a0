"""The two programs of a cascade: the model from top to bottom, the guide from bottom to top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyroboost.compose._checks import (
    StageFacts,
    check_leading,
    check_parents,
    check_sharing,
    dry_run,
    label,
)
from pyroboost.compose._joints import chained, no_copies, shared_plates
from pyroboost.handlers import capture, given, rename, unobserve
from pyroboost.metamodel import MetaModel

__all__ = ["Chain", "ChainProgram"]


def _signature(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(
        (v.shape, v.dtype, v.device) if isinstance(v, Tensor) else type(v) for v in values
    )


class Chain(nn.Module):
    """The stages of a cascade and the joints between them.

    Args:
        stages: meta-models, bottom first.
        args: for each stage the positions of the further arguments that it takes.
    """

    def __init__(
        self, stages: Sequence[MetaModel], args: Sequence[tuple[int, ...] | None]
    ) -> None:
        super().__init__()
        check_sharing(stages)
        self.stages = nn.ModuleList(stages)
        self.args = list(args)
        self.visible = stages[0].visible
        self._facts: dict[Any, list[StageFacts]] = {}
        self._led: set[tuple[int, str]] = set()
        for index, (below, stage) in enumerate(zip(stages, stages[1:], strict=False)):
            declared, taken = below.hidden_shape, stage.visible_shape
            if declared is not None and taken is not None and declared != taken:
                raise self._misfit(index, f"'{below.hidden}' has shape {declared}", f"takes {taken}")

    def args_of(self, index: int, args: Sequence[Any]) -> tuple[Any, ...]:
        """Return the further arguments of one stage."""
        positions = self.args[index]
        if positions is None:
            return tuple(args) if index == 0 else ()
        return tuple(args[p] for p in positions)

    def name(self, index: int, site: str) -> str:
        """Return the name in the cascade of a stage's own site."""
        if site != self.stages[index].visible:
            return f"{index}.{site}"
        return self.visible if index == 0 else f"{index - 1}.{self.stages[index - 1].hidden}"

    def _names(self, index: int, facts: StageFacts) -> rename:
        shared = facts.plates
        return rename(
            lambda site: self.name(index, site),
            plates=lambda plate: plate if plate in shared else f"{index}.{plate}",
        )

    def _misfit(self, index: int, has: str, takes: str) -> ValueError:
        lower, upper = label(index, self.stages[index]), label(index + 1, self.stages[index + 1])
        return ValueError(f"Cascade: {lower} does not fit under {upper}: {has}, and it {takes}.")

    def facts(self, x: Tensor, args: Sequence[Any]) -> list[StageFacts]:
        """Return what dry runs tell of each stage for data of this shape; checks come with them."""
        key = _signature((x, *args))
        if key not in self._facts:
            first = not self._facts
            facts = self._dry_runs(x, args)
            if first:
                check_sharing(self.stages)
                for index, (stage, fact) in enumerate(zip(self.stages[:-1], facts, strict=False)):
                    own = self.args_of(index, args)
                    check_parents(stage, label(index, stage), fact.template, own)
            if len(self._facts) > 64:  # ragged data: shapes without end
                self._facts.clear()
            self._facts[key] = facts
        return self._facts[key]

    def _dry_runs(self, x: Tensor, args: Sequence[Any]) -> list[StageFacts]:
        facts: list[StageFacts] = []
        template = x
        for index, stage in enumerate(self.stages):
            try:
                fact = dry_run(stage, label(index, stage), template, self.args_of(index, args))
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                if index == 0:
                    raise
                has = f"'{self.stages[index - 1].hidden}' has shape {tuple(template.shape)}"
                reason = str(error).strip().splitlines()[0]
                raise self._misfit(index - 1, has, f"cannot take that ({reason})") from error
            if facts and facts[-1].hidden_discrete != fact.visible_discrete:
                words = {True: "discrete", False: "continuous"}
                has = f"'{self.stages[index - 1].hidden}' is {words[facts[-1].hidden_discrete]}"
                takes = f"models a {words[fact.visible_discrete]} '{stage.visible}'"
                raise self._misfit(index - 1, has, takes)
            if facts and fact.scale not in (1.0, facts[0].scale):
                raise ValueError(
                    f"Cascade: {label(index, stage)} scales its data by {fact.scale:g} and the "
                    f"bottom stage by {facts[0].scale:g}; use one subsample of one plate."
                )
            facts.append(fact)
            template = torch.zeros_like(fact.hidden)
        return facts

    def _joint(self, index: int, facts: list[StageFacts]) -> ExitStack:
        """Enter the handlers around one stage, outermost first."""
        stack = ExitStack()
        if index and facts[index].scale != facts[0].scale:
            stack.enter_context(poutine.scale(scale=facts[0].scale))
        stack.enter_context(self._names(index, facts[0]))
        if index:
            name = label(index, self.stages[index])
            stack.enter_context(shared_plates(facts[0].plates, name))
        return stack

    def _lead(self, index: int, facts: StageFacts, args: Sequence[Any], **values: Tensor) -> None:
        (kind, value), own = next(iter(values.items())), facts.template.dim()
        own = facts.hidden.dim() if kind == "hidden" else own
        if value.dim() > own and (index, kind) not in self._led:
            stage = self.stages[index]
            flat = value.detach().reshape(-1, *value.shape[value.dim() - own :])
            name = label(index, stage)
            own_args = self.args_of(index, args)
            check_leading(stage, name, template=facts.template, args=own_args, **{kind: flat})
            self._led.add((index, kind))

    def run_model(self, x: Tensor, *args: Any, marginal: bool = False) -> None:
        """Draw h_k, ..., h_1 and score x: Eq. 3."""
        facts = self.facts(x, args)
        top = len(self.stages) - 1
        value: Tensor | None = None
        for index in range(top, -1, -1):
            stage = self.stages[index]
            program: Callable[..., Any] = stage.marginal if marginal and index == top else stage.model
            if value is not None:
                self._lead(index, facts[index], args, hidden=value)
                program = given(program, {stage.hidden: value})
            with self._joint(index, facts), ExitStack() as inner:
                site = inner.enter_context(capture(stage.visible))
                if index:
                    inner.enter_context(no_copies(stage.visible, label(index, stage)))
                    inner.enter_context(chained(stage.visible))
                    inner.enter_context(unobserve(stage.visible))
                template = facts[index].template if index else x
                program(template, *self.args_of(index, args))
            value = site.value

    def run_guide(self, x: Tensor, *args: Any) -> None:
        """Draw h_1, ..., h_k: Eq. 4."""
        facts = self.facts(x, args)
        value, top = x, len(self.stages) - 1
        for index, stage in enumerate(self.stages):
            if index:
                self._lead(index, facts[index], args, visible=value)
            program = stage.guide if index == top else stage.recognition
            with self._joint(index, facts), capture(stage.hidden) as site:
                program(value, *self.args_of(index, args))
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
