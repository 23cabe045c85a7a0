"""A pair as boosting sees it: its components, its layout, and the pair of one round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyroboost.contexts import service
from pyroboost.distributions import Components
from pyroboost.infer._mixture_draws import Programs, run
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
            "and sample one site from what it returns for a base."
        )
    return found[0]


def proposer(guide: nn.Module) -> Callable[..., Any] | None:
    """Return the guide's own way of placing a new component, if it has one."""
    fn: Any = guide
    while isinstance(fn, Program):
        fn = fn.fn
    found = getattr(fn, "propose", None) or getattr(getattr(fn, "__self__", None), "propose", None)
    return found if callable(found) else None


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
        inner.compute_log_prob()
        outer.compute_log_prob()
    sites = [s for t in (inner, outer) for s in t.nodes.values() if s["type"] == "sample"]
    depths = [-f.dim for s in sites for f in s["cond_indep_stack"] if f.dim is not None]
    depths += [s["log_prob"].dim() for s in sites if "log_prob" in s]
    nesting = max(depths, default=0)
    single = Programs(pair.model, pair.guide, pair, nesting, False)
    several = Programs(pair.model, pair.guide, pair, nesting, True)
    return several if _stacks(single, several, batch, device, seed) else single


def _stacks(
    single: Programs, several: Programs, batch: Sequence[Any], device: torch.device, seed: int
) -> bool:
    """Tell whether two draws at once have the log densities that each has by itself."""
    args = tuple(batch)
    with service(single.module), isolated_rng(device, seed), pyro.validation_enabled(False):
        try:
            values = [run(single, args, 0, [0], None) for _ in range(2)]
            z = torch.stack([v[3] for v in values])
            left = (1,) * (single.nesting + 2 - z.dim())
            z = z.reshape(2, *left, *z.shape[1:])
            both = run(several, args, 0, [0], 2, z)
        except Exception:  # whatever a model does with a dimension that it does not expect
            return False
    return all(
        torch.allclose(torch.cat([v[i] for v in values]), both[i], rtol=1e-3, atol=1e-3)
        for i in (0, 1)
    )
