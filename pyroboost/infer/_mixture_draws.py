"""Tables of draws from every component, by runs of the guide and the model after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyroboost.contexts import service
from pyroboost.distributions import BoostedFlow
from pyroboost.handlers import is_plate
from pyroboost.infer._mixture_table import Table, joined
from pyroboost.infer._round_law import at_site
from pyroboost.infer.errors import NonFiniteLoss
from pyroboost.infer.rng import isolated_rng

__all__ = ["Mixed", "Programs", "tabulate"]

Site = dict[str, Any]
_BLOCK = 256  # draws that are mapped at once


class Mixed(Exception):
    """Draws that were taken at once have other log densities than each by itself."""


@dataclass(frozen=True)
class Programs:
    """A model and its guide, as they are run for tables.

    Args:
        model: the model.
        guide: the guide.
        module: what holds both, to be put in eval mode.
        nesting: number of nested plates.
        vectorized: whether draws may be one more dimension on the left.
        mapped: whether `torch.vmap` may run both at given values, where that may not be; for a
            guide that draws nothing else.
        subsampled: whether a plate takes some of its rows: each draw of every component then sees
            the same ones, so that they compare.
        alone: dimensions of the boosted site's value by itself, for a guide that draws nothing
            else, so that single draws can be run again; else 0.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    module: nn.Module
    nesting: int
    vectorized: bool
    mapped: bool = False
    subsampled: bool = False
    alone: int = 0

    @property
    def together(self) -> bool:
        """Whether many draws take one run."""
        return self.vectorized or self.mapped


class _Drawn(TorchDistribution):
    """Draws of one component of a mixture."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - the name and form of torch

    def __init__(self, mixture: BoostedFlow, component: int) -> None:
        self.mixture, self.component = mixture, component
        super().__init__(mixture.batch_shape, mixture.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Drawn:
        return _Drawn(self.mixture.expand(batch_shape), self.component)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.mixture.rsample_component(self.component, sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(value.shape[:-1])


def tabulate(
    programs: Programs,
    batches: Sequence[tuple[Any, ...]],
    components: Sequence[int],
    num_samples: int,
    seed: int,
    *,
    over_data: bool,
    device: torch.device,
) -> Table:
    """Draw from each component, and score the draws under all of them and under the model.

    The same seed gives a component the same noise, whatever the others are.

    Args:
        programs: the model and the guide.
        batches: arguments of each run.
        components: which components to draw from.
        num_samples: draws S of each component, for each datum.
        seed: seed of the draws.
        over_data: whether the rows of a batch are data.
        device: whose random state comes back too.

    Raises:
        NonFiniteLoss: a draw has no finite density.
        ValueError: the rows of the site are not the data.
    """
    tables = []
    for place, batch in enumerate(batches):
        columns = []
        for c in components:
            stream = hash((seed, place, 0 if programs.subsampled else c)) % 2**63
            quiet = pyro.validation_enabled(False)  # what is not finite is told below
            with service(programs.module), isolated_rng(device, stream), quiet:
                columns.append(_column(programs, batch, c, components, num_samples))
        if over_data and columns[0][0].shape[1] != len(batch[0]):
            raise ValueError(
                f"boost: the boosted site has {columns[0][0].shape[1]} rows for {len(batch[0])} "
                "data; put it into a plate over the data, or train on whole data: steps=."
            )
        joint, scores = (torch.stack([col[i] for col in columns]) for i in (0, 1))
        if not bool(joint.isfinite().all() and (scores < math.inf).all()):
            raise NonFiniteLoss(
                "boost: log densities of draws are not finite; lower the learning rate, clip the "
                "gradient, or mend the model where these draws lie.",
                epoch=0,
                batch=place + 1,
                site=None,
                held_out=True,
            )
        tables.append(
            Table(
                joint,
                scores,
                columns[0][2],
                tuple(components),
                over_data,
                paired=programs.subsampled,
            )
        )
    return joined(tables)


def _column(
    programs: Programs, args: tuple[Any, ...], c: int, others: Sequence[int], count: int
) -> tuple[Tensor, ...]:
    """Return log p (S, N), log g of all (S, N, K) and the site's scale (N) of draws from c."""
    if programs.vectorized:
        found = run(programs, args, c, others, count)
        _check_few(programs, args, c, others, found)
        return found
    if programs.mapped:
        place = at_site(lambda q: _Drawn(q, c))
        with place:
            sites = poutine.trace(programs.guide).get_trace(*args).nodes
        drawn = sites[str(place.name)]["fn"].sample((count,))
        mapped = run_mapped(programs, args, c, others, drawn)
        _check_few(programs, args, c, others, (*mapped, drawn))
        return mapped
    rows = [run(programs, args, c, others, None) for _ in range(count)]
    return torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows]), rows[0][2]


def _check_few(
    programs: Programs,
    args: tuple[Any, ...],
    c: int,
    others: Sequence[int],
    found: tuple[Tensor, ...],
) -> None:
    """Run the first, the middle and the last draw again, each by itself.

    A model that branches on its values may go one way for all draws of the first trial and mix
    them later.
    """
    if not programs.alone:
        return
    joint, z = found[0], found[3]
    single = replace(programs, vectorized=False, mapped=False)
    for s in {0, len(joint) // 2, len(joint) - 1}:
        value = z[s].reshape(z[s].shape[-programs.alone :])
        own = run(single, args, c, others, None, value)[0][0].double()
        gap = (own - joint[s].double()).abs()
        least = 1e-3 + 64 * torch.finfo(joint.dtype).eps * float(joint[s].abs().max())
        if bool((gap > least).any()):
            raise Mixed


def run_mapped(
    programs: Programs, args: tuple[Any, ...], c: int, others: Sequence[int], values: Tensor
) -> tuple[Tensor, ...]:
    """Run guide and model at every value at once."""

    def one(value: Tensor) -> tuple[Tensor, ...]:
        return run(programs, args, c, others, None, value)[:3]

    joint, scores, scale = torch.vmap(one, randomness="different", chunk_size=_BLOCK)(values)
    return joint[:, 0], scores[:, 0], scale[0]


def run(
    programs: Programs,
    args: tuple[Any, ...],
    c: int,
    others: Sequence[int],
    count: int | None,
    value: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run guide and model once, with ``count`` draws on the left or with one."""
    place = at_site(lambda q: _Drawn(q, c), value)
    model, guide = programs.model, programs.guide
    plate = None if count is None else pyro.plate("draws", count, dim=-1 - programs.nesting)

    def once() -> tuple[poutine.Trace, poutine.Trace]:
        with place:
            inner = poutine.trace(guide).get_trace(*args)
        outer = poutine.trace(poutine.replay(model, trace=inner)).get_trace(*args)
        return inner, outer

    if plate is None:
        inner, outer = once()
    else:
        with plate:
            inner, outer = once()
    own = inner.nodes[str(place.name)]
    scored = {n for n, s in outer.nodes.items() if _counts(s) and (_fixed(s) or n in inner.nodes)}
    outer.compute_log_prob(lambda name, _: name in scored)
    taken = {n for n, s in inner.nodes.items() if _counts(s) and n != place.name}
    inner.compute_log_prob(lambda name, _: name in taken)
    z = own["value"]
    q: BoostedFlow = own["fn"].mixture
    lead = 1 if count is None else count
    shape = z.shape[:-1]
    batch = shape if count is None else _without(shape, programs.nesting)
    rows = Rows(lead, tuple(batch), None if count is None else programs.nesting)
    joint = sum(rows.of(outer.nodes[name]["log_prob"]) for name in sorted(scored))
    for name in sorted(taken):
        joint = joint - rows.of(inner.nodes[name]["log_prob"])
    scores = torch.stack([_flat(g, lead) for g in _scores(q, z, others)], -1)
    scale = torch.as_tensor(own["scale"], dtype=z.dtype, device=z.device)
    if own["mask"] is not None:
        scale = scale * torch.as_tensor(own["mask"], dtype=z.dtype, device=z.device)
    scale = _flat(scale.expand(shape), lead)[0]
    return torch.as_tensor(joint).expand(scores.shape[:-1]), scores, scale, z


def _scores(q: BoostedFlow, z: Tensor, which: Sequence[int]) -> list[Tensor]:
    chosen = BoostedFlow(
        q.base,
        [q.components[j] for j in which],
        context=q.context,
        allow_slow=True,
        validate_args=False,
    )
    return list(chosen.log_prob_components(z).unbind(-1))


def _counts(site: Site) -> bool:
    kind = site["type"] == "sample" and not is_plate(site)
    return kind and not site["infer"].get("_deterministic")


def _fixed(site: Site) -> bool:
    return bool(site["is_observed"])


def _without(shape: Sequence[int], nesting: int) -> tuple[int, ...]:
    """Leave out the dimension of the draws, and what stands left of it."""
    return tuple(shape[len(shape) - nesting :]) if nesting else ()


def _flat(values: Tensor, lead: int) -> Tensor:
    return values.reshape(lead, -1)


@dataclass(frozen=True)
class Rows:
    """Which dimensions of a log density are rows of the boosted site.

    Args:
        draws: how many draws there are.
        batch: the site's batch shape without that of the draws.
        nesting: where the draws are: that many dimensions to the right; ``None``: nowhere.
    """

    draws: int
    batch: tuple[int, ...]
    nesting: int | None

    def of(self, values: Tensor) -> Tensor:
        """Sum to one number a draw and row, (S, N); what rows share is divided among them."""
        right = len(self.batch) if self.nesting is None else self.nesting
        lead = max(0, right + 1 - values.dim())
        parts = values.reshape((1,) * lead + tuple(values.shape))
        # What is left of the draws, or without them of the rows, belongs to each draw alone.
        extra = parts.dim() - right - (0 if self.nesting is None else 1)
        if self.nesting is None:
            parts = parts.sum(tuple(range(extra))).unsqueeze(0)
        elif extra:
            parts = parts.sum(tuple(range(extra)))
        batch = (1,) * (right - len(self.batch)) + self.batch
        for dim, size in enumerate(batch, 1):
            if parts.shape[dim] != size:
                parts = parts.sum(dim, keepdim=True) / size
        return parts.expand(-1, *batch).reshape(len(parts), -1).expand(self.draws, -1)
