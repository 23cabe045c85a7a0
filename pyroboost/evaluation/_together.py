"""Many runs of guide and model at once, in a plate outside those of the programs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroboost.contexts import service
from pyroboost.evaluation import _traces as tr
from pyroboost.handlers import is_plate

__all__ = ["imposed", "runs", "runs_at"]

_BLOCK = 256  # runs at once, at most
_NUMBERS = 2**22  # of all sites of the runs that are made at once, at most
_UNFIT = (ValueError, RuntimeError, IndexError, NotImplementedError, AssertionError, TypeError)
Values = Mapping[str, Tensor]


class _Impose(Messenger):
    """Give sample sites values from elsewhere; unlike conditioned ones, they stay latent."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not is_plate(msg) and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def imposed(program: Callable[..., Any], values: Values) -> Callable[..., Any]:
    """Return the program with its latent sites at these values."""

    def run(*args: Any) -> Any:
        with _Impose(values):
            return program(*args)

    return run


def runs(item: tr.Subject, args: Sequence[Any], count: int) -> Iterator[tr.Traced]:
    """Run guide and model as `traced` does, many at once where each by itself agrees with that."""
    first = next(tr.traced(item, args, 1))
    yield first
    left, size = count - 1, _size(item, first)
    while left and size > 1:
        made = _plated(item, args, first, min(left, size))
        if made is None or not _agree(item, args, made):
            break
        yield from made
        left -= len(made)
    yield from tr.traced(item, args, left)


def runs_at(
    item: tr.Subject, args: Sequence[Any], first: tr.Traced, guide: Values, model: Values
) -> list[tr.Traced] | None:
    """Run both programs at given values, one run for each row; None where that is not possible.

    Args:
        item: the pair.
        args: arguments of both programs.
        first: one run, which says of what shapes the sites are.
        guide: values of the sites that the guide draws.  # (S, ...)
        model: values of the model's latent sites.  # (S, ...)
    """
    count, size = len(next(iter(model.values()))), _size(item, first)
    found: list[tr.Traced] = []
    while len(found) < count:
        rows = slice(len(found), min(len(found) + size, count))
        wide = [
            {name: _widened(sites[name], value[rows], _depth(first)) for name, value in part}
            for sites, part in ((first.guide, guide.items()), (first.model, model.items()))
        ]
        there = replace(
            item, guide=imposed(item.guide, wide[0]), model=imposed(item.model, wide[1])
        )
        made = _plated(there, args, first, rows.stop - rows.start) if size > 1 else None
        if made is None or not _agree(item, args, made):
            return None
        found += made
    return found


def _size(item: tr.Subject, first: tr.Traced) -> int:
    """Count the runs that are made at once; 1 for programs that are run one by one."""
    sites = [*first.model.values(), *first.guide.values()]
    if item.pair is not None or any(bool(torch.as_tensor(s["scale"] != 1).any()) for s in sites):
        return 1
    numbers = sum(max(s["value"].numel(), math.prod(tr.batch_shape(s))) for s in sites)
    return max(1, min(_BLOCK, _NUMBERS // max(1, numbers)))


def _depth(first: tr.Traced) -> int:
    """Count the batch dimensions of all sites, whether plates declare them or not."""
    sites = [*first.model.values(), *first.guide.values()]
    frames = [-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized]
    return max([len(tr.batch_shape(s)) for s in sites] + frames, default=0)


def _widened(site: tr.Site, values: Tensor, depth: int) -> Tensor:
    """Put the dimension of the runs outside of `depth` batch dimensions."""
    shape = site["value"].shape
    return values.reshape(len(values), *[1] * (depth - len(tr.batch_shape(site))), *shape)


def _plated(
    item: tr.Subject, args: Sequence[Any], first: tr.Traced, count: int
) -> list[tr.Traced] | None:
    """Run both programs once in a plate, and take the runs apart."""
    try:
        with service(*item.modules), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a way that may not be taken
            with pyro.plate("_runs", count, dim=-1 - _depth(first)):
                guide = poutine.trace(item.guide).get_trace(*args)
                model = poutine.trace(poutine.replay(item.model, trace=guide)).get_trace(*args)
            wanted = set(first.scored)
            model.compute_log_prob(lambda name, _: name in wanted)
            guide.compute_log_prob(lambda name, _: name in first.guide)
            parts = (first.model, model), (first.guide, guide), (first.computed, model)
            rows = [
                {name: _rows(site, trace.nodes[name], count) for name, site in sites.items()}
                for sites, trace in parts
            ]
        return [
            tr.Traced(*({n: s[i] for n, s in part.items()} for part in rows)) for i in range(count)
        ]
    except (*_UNFIT, KeyError):
        return None


def _rows(like: tr.Site, site: tr.Site, count: int) -> list[tr.Site]:
    """Return a site of many runs as one of each; the runs are outside of all other dimensions."""
    values = _apart(like["value"].shape, site["value"], count)
    if "unscaled_log_prob" not in like:
        return [{**like, "value": value} for value in values]
    log_prob = site["unscaled_log_prob"]
    terms = _apart(like["unscaled_log_prob"].shape, log_prob, count)
    masks: Sequence[Any] = [like["mask"]] * count
    if isinstance(site["mask"], Tensor):
        masks = _apart(like["unscaled_log_prob"].shape, site["mask"].expand(log_prob.shape), count)
    return [
        {**like, "value": value, "unscaled_log_prob": term, "mask": mask}
        for value, term, mask in zip(values, terms, masks, strict=True)
    ]


def _apart(shape: torch.Size, values: Tensor, count: int) -> Sequence[Tensor]:
    if values.numel() == count * shape.numel():
        return values.reshape(count, *shape).unbind()
    if values.shape != shape:
        raise ValueError("it has not one value for each run")
    return [values] * count


def _agree(item: tr.Subject, args: Sequence[Any], made: Sequence[tr.Traced]) -> bool:
    """Tell whether some of the runs are what guide and model give when run there alone."""
    return all(_same(item, args, made[i]) for i in {0, len(made) // 2, len(made) - 1})


def _same(item: tr.Subject, args: Sequence[Any], run: tr.Traced) -> bool:
    drawn = {n: s["value"] for n, s in run.guide.items() if not isinstance(s["fn"], dist.Delta)}
    latent = {n: run.model[n]["value"] for n in run.latent if n not in run.guide}
    alone = replace(item, guide=imposed(item.guide, drawn), model=imposed(item.model, latent))
    try:
        one = next(tr.traced(alone, args, 1))
    except _UNFIT:
        return False
    values = [
        (mine[name]["value"], site["value"])
        for mine, theirs in ((run.model, one.model), (run.computed, one.computed))
        for name, site in theirs.items()
    ]
    terms = [
        (mine[name]["unscaled_log_prob"].sum(), site["unscaled_log_prob"].sum())
        for mine, theirs in ((run.model, one.model), (run.guide, one.guide))
        for name, site in theirs.items()
        if "unscaled_log_prob" in site
    ]
    return all(a.shape == b.shape and _close(a, b) for a, b in [*values, *terms])


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-4, atol=1e-3, equal_nan=True)
