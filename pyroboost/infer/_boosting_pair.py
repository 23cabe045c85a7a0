"""A pair as boosting sees it: its components, its layout, and the pair of one round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyroboost.contexts import service
from pyroboost.distributions import Components
from pyroboost.handlers import is_plate
from pyroboost.infer._boosting_losses import DrawnELBO
from pyroboost.infer._coupled_rows import Drawn, check_rows, is_random
from pyroboost.infer._mixture_draws import Programs, run, run_mapped
from pyroboost.infer._round_law import RoundLaw, Stage, at_site, scale_kl
from pyroboost.infer.rng import isolated_rng
from pyroboost.metamodel import MetaModel
from pyroboost.program import Program

__all__ = ["Closed", "find_components", "layout", "only", "proposer", "staged"]


class Closed(nn.Module):
    """A program with its arguments, run on all of them whatever batch comes."""

    def __init__(self, program: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.program, self.args, self.kwargs = program, tuple(args), dict(kwargs)

    def forward(self, *_: Any) -> Any:
        """Run the program."""
        return self.program(*self.args, **self.kwargs)


def find_components(guide: nn.Module) -> Components:
    """Return the one set of components that a guide holds."""
    found = list({id(m): m for m in guide.modules() if isinstance(m, Components)}.values())
    if len(found) != 1:
        raise ValueError(
            f"boost: the guide holds {len(found)} pyroboost.distributions.Components; give it one, "
            "and sample one site from what it returns for a base; greedy boosts the stages of a "
            "cascade one after another."
        )
    return found[0]


def proposer(guide: nn.Module) -> Callable[..., Any] | None:
    """Return the guide's own way of placing a new component, if it or a part of it has one.

    A part, such as a member of a list or the function of a partial, is given the arguments of its
    own last call.
    """
    fn: Any = guide
    while isinstance(fn, Program):
        fn = fn.fn
    for owner in (fn, getattr(fn, "__self__", None)):
        if callable(found := getattr(owner, "propose", None)):
            return found
    for part in guide.modules():
        holds = any(isinstance(m, Components) for m in part.children())
        if holds and callable(found := getattr(part, "propose", None)):
            return partial(_proposed_again, part)
    return None


def _proposed_again(part: Any, c: int, *_: Any, attempt: int | None = None, **__: Any) -> None:
    """Let a part of a guide propose, on the arguments that the guide gives it."""
    if getattr(part, "last_call", None) is None:
        part.components.restart(c)
        return
    args, kwargs = part.last_call
    part.propose(c, *args, attempt=attempt, **kwargs)


class _Model(nn.Module):
    """A model in a round."""

    def __init__(self, program: nn.Module, stage: Stage) -> None:
        super().__init__()
        self.program, self.stage = program, stage

    def forward(self, *args: Any) -> Any:
        """Run the model, scaled with the guide where the round scales the whole KL."""
        if not self.stage.whole:
            return self.program(*args)
        with scale_kl(self.stage):
            return self.program(*args)


class _Guide(nn.Module):
    """A guide in a round, whose boosted site has the round's law."""

    counts: Tensor

    def __init__(self, program: nn.Module, stage: Stage, frozen: Sequence[nn.Module]) -> None:
        super().__init__()
        self.program, self.stage = program, stage
        self._frozen = [part for flow in frozen for part in flow.modules()]
        self.register_buffer("counts", stage.counts)

    def forward(self, *args: Any) -> Any:
        """Run the guide."""
        for part in self._frozen:  # a flow without parameters would be put in training mode
            part.training = False
        self.stage.toss()
        law = at_site(lambda q: RoundLaw(q, self.stage))
        if not self.stage.whole:
            with law:
                return self.program(*args)
        # The law is put in place first: it has its lambda already.
        with scale_kl(self.stage, everything=True), law:
            return self.program(*args)


def staged(pair: MetaModel, components: Components, stage: Stage) -> MetaModel:
    """Return the pair of a round: the same networks, another law at the boosted site."""
    frozen = [flow for c, flow in enumerate(components.flows) if c != stage.component]
    model, guide = _Model(pair.model, stage), _Guide(pair.guide, stage, frozen)
    return MetaModel(model, guide, visible=pair.visible, hidden=pair.hidden)


@contextmanager
def only(components: Components, which: Sequence[int], weights: Tensor) -> Iterator[None]:
    """Let some flows train beside what is not a flow, under given weights; undo it afterwards.

    The flows that do not train are in eval mode, so that their buffers stand still too.
    """
    others = [flow for c, flow in enumerate(components.flows) if c not in which]
    flags = [(p, p.requires_grad) for flow in others for p in flow.parameters()]
    modes = [(part, part.training) for flow in others for part in flow.modules()]
    kept = components.weights.clone()
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        for part, _ in modes:
            part.training = False
        components.weights.copy_(weights)
        yield
    finally:
        components.weights.copy_(kept)
        for p, flag in flags:
            p.requires_grad_(flag)
        for part, mode in modes:
            part.training = mode


def layout(pair: MetaModel, batch: Sequence[Any], device: torch.device, seed: int) -> Programs:
    """Measure how deep plates nest, and try whether draws may be one more dimension."""
    quiet = pyro.validation_enabled(False)  # a model that breaks is for the fit to name
    with service(pair), isolated_rng(device, seed), quiet:
        with at_site(lambda q: RoundLaw(q, Stage(0))):
            inner = poutine.trace(pair.guide).get_trace(*batch)
        outer = poutine.trace(poutine.replay(pair.model, trace=inner)).get_trace(*batch)
        _check_guided(outer, inner)
        inner.compute_log_prob()
        outer.compute_log_prob()
    check_rows(pair, batch, device, seed)
    sites = [s for t in (inner, outer) for s in t.nodes.values() if s["type"] == "sample"]
    depths = [-f.dim for s in sites for f in s["cond_indep_stack"] if f.dim is not None]
    depths += [s["log_prob"].dim() for s in sites if "log_prob" in s]
    nesting = max(depths, default=0)
    drawn = [s for s in inner.nodes.values() if s["type"] == "sample" and is_random(s)]
    alone = drawn[0]["value"].dim() if len(drawn) == 1 else 0
    single = Programs(pair.model, pair.guide, pair, nesting, False, alone=alone)
    if _subsampled(sites):
        return replace(single, subsampled=True)
    args = tuple(batch)
    ways = [replace(single, vectorized=True)]
    if _draws_once(inner):
        ways.append(replace(single, mapped=True))
    return next((way for way in ways if _agrees(single, way, args, device, seed)), single)


def _agrees(
    single: Programs, several: Programs, args: tuple[Any, ...], device: torch.device, seed: int
) -> bool:
    """Tell whether three draws at once have the log densities that each has by itself."""
    checked = pyro.infer.util.is_validation_enabled()
    with service(single.module), isolated_rng(device, seed), pyro.validation_enabled(False):
        try:
            drawn = Drawn()
            each = replace(single, guide=drawn(single.guide))
            values = [run(each, args, 0, [0], None) for _ in range(3)]
            if several.mapped:
                z = torch.stack([v[3] for v in values])
                both: Sequence[Tensor] = run_mapped(several, args, 0, [0], z)
            else:
                again = _Again(drawn, single.nesting)
                both = run(replace(several, guide=again(several.guide)), args, 0, [0], 3)
                with pyro.validation_enabled(checked):  # what Pyro says of the sites' shapes
                    law = at_site(lambda q: RoundLaw(q, Stage(0)))
                    loss = DrawnELBO(3, several.nesting, stacks=True)
                    loss.loss(several.model, law(several.guide), *args)
        except Exception:  # whatever a model does with a dimension that it does not expect
            return False
    return all(_same(torch.cat([v[i] for v in values]), both[i]) for i in (0, 1))


class _Again(Messenger):
    """Put the draws of several runs side by side, left of the plates, instead of new draws."""

    def __init__(self, drawn: Drawn, nesting: int) -> None:
        super().__init__()
        self.drawn, self.nesting = drawn, nesting

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if is_random(msg) and name in self.drawn.values:
            stacked = torch.stack(self.drawn.values[name])
            plates = stacked.dim() - 1 - self.drawn.event_dims[name]
            left = (1,) * (self.nesting - plates)
            msg["value"] = stacked.reshape(len(stacked), *left, *stacked.shape[1:])


def _same(apart: Tensor, together: Tensor) -> bool:
    """Compare up to rounding: a share of a large total could hide a term that is counted twice."""
    largest = torch.where(apart.isfinite(), apart, 0.0).abs().max()
    least = 1e-3 + 64 * torch.finfo(apart.dtype).eps * float(largest)
    return torch.allclose(apart, together, rtol=0.0, atol=least)


def _subsampled(sites: Sequence[dict[str, Any]]) -> bool:
    """Tell whether a plate takes some of its rows: draws at once would share them."""
    frames = [f for s in sites for f in s["cond_indep_stack"]]
    return any(f.full_size is not None and f.full_size != f.size for f in frames)


def _check_guided(model: Trace, guide: Trace) -> None:
    """Refuse latent sites that the guide knows nothing of: they would be trained at random."""
    for name, site in model.nodes.items():
        if site["type"] != "sample" or is_plate(site) or name in guide.nodes:
            continue
        if not (site["is_observed"] or site["infer"].get("_deterministic")):
            raise ValueError(
                f"boost: the model samples '{name}', of which the guide knows nothing; sum it out "
                "in the model, for example by a mixture distribution, or sample it in the guide."
            )


def _draws_once(trace: Trace) -> bool:
    """Tell whether a guide draws its boosted site and no other, outside all plates and masks."""
    drawn = [s for s in trace.nodes.values() if s["type"] == "sample" and is_random(s)]
    return len(drawn) == 1 and not drawn[0]["fn"].batch_shape and drawn[0]["mask"] is None
