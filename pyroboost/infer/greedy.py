"""Greedy boosting: train the stages of a cascade one after another and say what each added."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroboost.compose import Cascade
from pyroboost.contexts import forked_rng
from pyroboost.infer.batches import Batches
from pyroboost.infer.convergence import Convergence, check_convergence
from pyroboost.infer.errors import check_composition
from pyroboost.infer.fit import fit
from pyroboost.infer.gains import Gain, Verdict, stage_gain
from pyroboost.infer.weighting import redrawn, takes_weights
from pyroboost.metamodel import Round

__all__ = ["Boosted", "StageReport", "greedy", "train_round"]


@dataclass(frozen=True)
class StageReport:
    """What happened to one stage.

    Args:
        index: the stage's place, from 0 at the bottom.
        name: its class.
        train: L_k on training data.
        held_out: L_k on held-out data, where there are any.
        verdict: what L_k says; ``"base"`` for the bottom stage, whose term is its own bound.
        convergence: whether anything above can help, where it was asked for.
        fit: the fit, or the result of the stage's own algorithm.
        seconds: time of its training.
    """

    index: int
    name: str
    train: Gain
    held_out: Gain | None
    verdict: Verdict
    convergence: Convergence | None
    fit: Any = field(repr=False)
    seconds: float = 0.0


@dataclass(frozen=True)
class Boosted:
    """A greedily trained cascade and the reports of its stages.

    Args:
        cascade: the cascade; shorter than the one passed if boosting stopped by itself.
        stages: one report per stage that was trained.
    """

    cascade: Cascade
    stages: tuple[StageReport, ...]

    def table(self) -> str:
        """Return the reports as a table for people, in nats per datum."""
        rows = [f"{'stage':<12} {'L_k train':>18} {'L_k held out':>18} {'seconds':>8}  verdict"]
        for s in self.stages:
            words = (
                s.verdict if s.convergence is None else f"{s.verdict}; {s.convergence.describe()}"
            )
            held_out = "" if s.held_out is None else str(s.held_out)
            name = f"{s.index}: {s.name}"
            rows.append(f"{name:<12} {s.train!s:>18} {held_out:>18} {s.seconds:>8.1f}  {words}")
        return "\n".join(rows)

    __str__ = table


def greedy(
    cascade: Cascade,
    data: Any,
    *,
    validation: Any = None,
    weights: Tensor | None = None,
    validation_weights: Tensor | None = None,
    start: int = 0,
    stages: Mapping[int, Mapping[str, Any]] | None = None,
    stop: bool = False,
    convergence: bool = False,
    evaluate_on: int = 10_000,
    checkpoints: str | Path | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Boosted:
    r"""Train the stages of a cascade one after another, each on what the stages below infer.

    For stage k = 1, 2, ..., draw $h_{k-1} \sim q(h_{k-1} \mid x)$ afresh in every epoch and train
    $m_k(h_{k-1}, h_k)$ on it; the stages below are frozen, buffers too, and in eval mode. Then

    $$L_k = \mathbb{E}_q [\log m_k(h_{k-1})] - \mathbb{E}_q [\log m_{k-1}(h_{k-1})]$$

    is measured on training and held-out data, $\log m_k$ by the stage's own bound. The verdict is
    taken on held-out data where there are any: the bound *grows* if $L_k$ exceeds two standard
    errors, *nothing is gained* within two, and the stage is *not well trained* below.

    A stage with an algorithm of its own (``own_fit``, such as EM) is fitted by that on one draw of
    $h_{k-1}$ per datum. Of the settings it is given those that it takes: none of :func:`fit` for
    EM; ``lr``, ``batch_size`` and the like for one that consists of fits by gradients.

    Args:
        cascade: the cascade; its stages are trained in place.
        data: training data, in any form that :func:`fit` takes.
        validation: held-out data, likewise.
        weights: a weight for each datum, as in :func:`fit`; an own algorithm is given data drawn
            anew in proportion to them.  # (N,)
        validation_weights: the same for held-out data.  # (M,)
        start: first stage to be trained; those below keep their values, so that
            ``greedy(cascade + stage, data, start=len(cascade))`` trains the new stage only.
        stages: settings of :func:`fit` (or of the own algorithm) by stage, over the common ones;
            ``{"method": "gradient"}`` trains a stage that has its own algorithm by gradients.
        stop: stop after the first stage above the bottom whose verdict is not that the bound
            grows; that stage is left out of the cascade returned.
        convergence: look, after each stage, for signs that nothing above can help.
        evaluate_on: how many data serve the measurements at most.
        checkpoints: folder of one checkpoint per stage; the same call resumes from it.
        seed: seed of all random streams, by stage; ``None`` draws from the global generators.
        **settings: common settings of :func:`fit`: ``epochs``, ``batch_size``, ``lr``, ...

    Returns:
        The cascade and a report per trained stage.

    Raises:
        TypeError: ``cascade`` is none.
        ValueError: ``start`` or ``stages`` names no stage.

    Example:
        >>> from pyroboost.models import VAE
        >>> bits = (torch.rand(64, 6) < 0.5).float()
        >>> pair = Cascade(VAE(6, 2, units=8), VAE(2, 2, units=8, likelihood="gaussian"))
        >>> result = greedy(pair, bits, epochs=1, seed=0)
        >>> [stage.name for stage in result.stages], result.stages[0].verdict
        (['VAE', 'VAE'], 'base')

    Reference:
        Cascaded meta-models, Algorithm 1 and section 2.4; Eq. 7.
    """
    check_composition("greedy", cascade, Cascade)
    options = dict(stages or {})
    if not 0 <= start < len(cascade) or not set(options) <= set(range(len(cascade))):
        raise ValueError(
            f"greedy: start={start} or stages={sorted(options)} names a stage that the cascade of "
            f"{len(cascade)} stages does not have; count from 0."
        )
    reports: list[StageReport] = []
    for index, item in enumerate(cascade.rounds(data, validation)):
        if index < start:
            continue
        item = item._replace(weights=weights, validation_weights=validation_weights)
        own = {**settings, **options.get(index, {})}
        stream = None if seed is None else seed + index
        reports.append(
            _run(cascade, index, item, own, checkpoints, stream, evaluate_on, convergence)
        )
        if stop and index and reports[-1].verdict != "grows":
            return Boosted(cascade[:index], tuple(reports))
    return Boosted(cascade, tuple(reports))


def _run(
    cascade: Cascade,
    index: int,
    item: Round,
    settings: dict[str, Any],
    checkpoints: str | Path | None,
    seed: int | None,
    evaluate_on: int,
    convergence: bool,
) -> StageReport:
    began = time.perf_counter()
    result = train_round(index, item, settings, checkpoints, seed)
    with forked_rng(seed):
        item.pair.refresh()
    seconds = time.perf_counter() - began
    size = settings.get("batch_size", 100)
    train = _gather(item, item.data, size, evaluate_on, seed)
    gains = [stage_gain(cascade, index, *train, weights=_first(item.weights, train), seed=seed)]
    held_out = None
    if item.validation is not None:
        held_out = _gather(item, item.validation, size, evaluate_on, seed)
        shares = _first(item.validation_weights, held_out)
        gains.append(stage_gain(cascade, index, *held_out, weights=shares, seed=seed))
    verdict = gains[-1].verdict() if index else "base"
    found = None
    if convergence and verdict != "not well trained: retrain":
        below = [
            cascade.climb(*rows, stages=index)[-1] if index else rows[0]
            for rows in (train, held_out)
            if rows is not None
        ]
        found = check_convergence(
            item.pair, below[0], held_out=below[1] if held_out is not None else None, seed=seed or 0
        )
    return StageReport(
        index=index,
        name=type(item.pair).__name__,
        train=gains[0],
        held_out=gains[1] if held_out is not None else None,
        verdict=verdict,
        convergence=found,
        fit=result,
        seconds=seconds,
    )


def _first(weights: Tensor | None, rows: tuple[Tensor, ...]) -> Tensor | None:
    return None if weights is None else weights[: len(rows[0])]


def train_round(
    index: int,
    item: Round,
    settings: dict[str, Any],
    checkpoints: str | Path | None,
    seed: int | None,
) -> Any:
    """Solve one round of any boosting method: fit one stage or part.

    It is fitted by its own algorithm if it has one and gradients were not asked for; a cascade,
    which other methods have for a part, is trained stage by stage.

    Args:
        index: the round, from 0.
        item: the round.
        settings: settings of :func:`fit`, of the own algorithm or of :func:`greedy`.
        checkpoints: folder of the round's checkpoint.
        seed: seed of the round's own random stream.

    Returns:
        What the fit returned.
    """
    if isinstance(item.pair, Cascade) and len(item.pair) > 1:
        return greedy(
            item.pair,
            item.data,
            validation=item.validation,
            weights=item.weights,
            validation_weights=item.validation_weights,
            checkpoints=None if checkpoints is None else Path(checkpoints) / item.name,
            seed=seed,
            **settings,
        )
    own = item.pair.own_fit
    method = settings.pop("method", None)
    if method not in (None, "gradient", "own") or (method == "own" and own is None):
        raise ValueError(
            f"boosting: method {method!r} of round {index} is unknown to "
            f"{type(item.pair).__name__}; use 'gradient', or 'own' for what has an algorithm of "
            "its own."
        )
    if own is None or method == "gradient":
        if checkpoints is not None:
            Path(checkpoints).mkdir(parents=True, exist_ok=True)
            settings = {"checkpoint": Path(checkpoints) / f"{item.name}.pt", **settings}
        return fit(
            item.pair,
            item.data,
            validation=item.validation,
            transform=item.transform,
            weights=item.weights,
            validation_weights=item.validation_weights,
            seed=seed,
            **settings,
        )
    size = settings.get("batch_size", 100)
    (data, *_), held_out = _gather(item, item.data, size, None, seed, encode=True), None
    if item.validation is not None:
        held_out = _gather(item, item.validation, size, None, seed, encode=True)[0]
    with forked_rng(seed):
        # Held-out data are drawn anew in any case: no own algorithm weighs those.
        held_out = held_out if held_out is None else redrawn(held_out, item.validation_weights)
        options = own_settings(own, settings)
        if takes_weights(own) and item.weights is not None:
            options["weights"] = item.weights
        else:
            data = redrawn(data, item.weights)
        return own(data, validation=held_out, **options)


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


def _gather(
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
