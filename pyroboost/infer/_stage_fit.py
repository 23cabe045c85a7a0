"""One round of any boosting method: how a stage or part is fitted, and on what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroboost.compose import Cascade
from pyroboost.contexts import forked_rng
from pyroboost.distributions import Components
from pyroboost.infer._boosting_report import Boosting
from pyroboost.infer.batches import Batches
from pyroboost.infer.boosting import boost
from pyroboost.infer.fit import fit
from pyroboost.infer.weighting import redrawn, takes_weights
from pyroboost.metamodel import Round

__all__ = ["gather", "own_settings", "train_round"]


def train_round(
    index: int,
    item: Round,
    settings: dict[str, Any],
    checkpoints: str | Path | None,
    seed: int | None,
) -> Any:
    """Solve one round of any boosting method: fit one stage or part.

    It is fitted by its own algorithm if it has one, or boosted if its guide holds a mixture of
    several flows, and gradients were not asked for; a cascade, which other methods have for a
    part, is trained stage by stage.

    Args:
        index: the round, from 0.
        item: the round.
        settings: settings of :func:`fit`, of the own algorithm or of :func:`greedy`.
        checkpoints: folder of the round's checkpoint.
        seed: seed of the round's own random stream.

    Returns:
        What the fit returned.
    """
    common = {
        "validation": item.validation,
        "weights": item.weights,
        "validation_weights": item.validation_weights,
        "seed": seed,
    }
    if isinstance(item.pair, Cascade) and len(item.pair) > 1:
        from pyroboost.infer.greedy import greedy  # it calls this function in turn

        folder = None if checkpoints is None else Path(checkpoints) / item.name
        return greedy(item.pair, item.data, checkpoints=folder, **common, **settings)
    own, method = item.pair.own_fit, _method(index, item, settings.pop("method", None))
    if method == "boost":
        return _boosted(item, settings, checkpoints, seed)
    if method == "gradient":
        if checkpoints is not None:
            Path(checkpoints).mkdir(parents=True, exist_ok=True)
            settings = {"checkpoint": Path(checkpoints) / f"{item.name}.pt", **settings}
        return fit(item.pair, item.data, transform=item.transform, **common, **settings)
    assert own is not None
    size = settings.get("batch_size", 100)
    (data, *_), held_out = gather(item, item.data, size, None, seed, encode=True), None
    if item.validation is not None:
        held_out = gather(item, item.validation, size, None, seed, encode=True)[0]
    with forked_rng(seed):
        # Held-out data are drawn anew in any case: no own algorithm weighs those.
        held_out = held_out if held_out is None else redrawn(held_out, item.validation_weights)
        options = own_settings(own, settings)
        if takes_weights(own) and item.weights is not None:
            options["weights"] = item.weights
        else:
            data = redrawn(data, item.weights)
        return own(data, validation=held_out, **options)


def _method(index: int, item: Round, asked: str | None) -> str:
    """Return how a pair is fitted: by its own algorithm, by boosting or by gradients."""
    pair = item.pair
    mixtures = {id(m): m for m in pair.guide.modules() if isinstance(m, Components)}.values()
    boostable = len(mixtures) == 1 and all(len(m) > 1 for m in mixtures)
    able = {"own": pair.own_fit is not None, "boost": boostable, "gradient": True}
    if asked is None:
        # Boosting is by the plain bound: a pair with an objective of its own is trained by that.
        unasked = {**able, "boost": boostable and pair.objective() is None}
        return next(name for name, possible in unasked.items() if possible)
    if not able.get(asked):
        lacks = {"own": "has no algorithm of its own", "boost": "holds no single boosted mixture"}
        raise ValueError(
            f"boosting: method {asked!r} of round {index} is not for {type(pair).__name__}, which "
            f"{lacks.get(asked, 'does not know it')}; use "
            f"{' or '.join(repr(name) for name, possible in able.items() if possible)}."
        )
    return asked


def _boosted(
    item: Round, settings: dict[str, Any], checkpoints: str | Path | None, seed: int | None
) -> Boosting:
    """Boost the guide's mixture, on data drawn in proportion to their weights."""
    if checkpoints is not None:
        settings = {"checkpoints": Path(checkpoints) / item.name, **settings}
    size = settings.get("batch_size", 100)
    parts = []
    for data, weights in (
        (item.data, item.weights),
        (item.validation, item.validation_weights),
    ):
        if data is not None and weights is not None:
            with forked_rng(seed):
                rows = gather(item, data, size, None, seed)
                chosen = redrawn(torch.arange(len(rows[0])), weights.to(rows[0].device))
                data = tuple(part[chosen.to(part.device)] for part in rows)
        parts.append(data)
    return boost(
        item.pair,
        parts[0],
        validation=parts[1],
        transform=item.transform,
        seed=seed,
        **settings,
    )


_ONE_FIT = {"epochs", "loss", "annealing", "checkpoint", "checkpoint_every", "resume"}
_FIT_ONLY = _ONE_FIT | {
    "batch_size", "lr", "optimizer", "scheduler", "clip_norm", "patience",
    "num_validation_particles", "callbacks", "device", "progress",
}  # fmt: skip


def own_settings(own: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what only a gradient fit takes, so that common settings may stand beside EM.

    What the own algorithm names is kept. One that takes any setting, since it consists of fits by
    gradients, is given all but those of a single fit, such as its epochs.

    Args:
        own: the own algorithm.
        settings: settings, some of them meant for :func:`fit`.

    Example:
        >>> given = {"epochs": 5, "lr": 0.1, "restarts": 2}
        >>> own_settings(lambda data, *, restarts=1: None, given)
        {'restarts': 2}
        >>> own_settings(lambda data, *, restarts=1, **settings: None, given)
        {'lr': 0.1, 'restarts': 2}
    """
    taken = signature(own).parameters.values()
    several = any(p.kind is Parameter.VAR_KEYWORD for p in taken)
    left_out = (_ONE_FIT if several else _FIT_ONLY) - {p.name for p in taken}
    return {name: value for name, value in settings.items() if name not in left_out}


def gather(
    item: Round,
    data: Any,
    batch_size: int,
    limit: int | None,
    seed: int | None,
    *,
    encode: bool = False,
) -> tuple[Tensor, ...]:
    """Collect one epoch of data, or its first rows; with ``encode``, as the round sees them."""
    first = next(item.pair.parameters(), torch.zeros(()))
    batches = Batches(data, batch_size, first.device, shuffle=False)
    kept: list[tuple[Tensor, ...]] = []
    with forked_rng(seed):
        count = 0
        for batch in batches.epoch():
            kept.append(item.transform(*batch) if encode and item.transform else batch)
            count += len(batch[0])
            if limit is not None and count >= limit:
                break
    return tuple(torch.cat(parts)[:limit] for parts in zip(*kept, strict=True))
