"""Greedy boosting: train the stages of a cascade one after another and say what each added."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pyroboost.compose import Cascade
from pyroboost.contexts import forked_rng
from pyroboost.infer._stage_fit import gather, train_round
from pyroboost.infer.convergence import Convergence, check_convergence
from pyroboost.infer.errors import check_composition
from pyroboost.infer.gains import Gain, Verdict, stage_gain
from pyroboost.metamodel import Round

__all__ = ["Boosted", "StageReport", "greedy"]


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
    EM; ``lr``, ``batch_size`` and the like for one that consists of fits by gradients. A stage
    whose guide holds a mixture of several flows (``BoostedFlowGuide``) is fitted by :func:`boost`,
    on fresh draws like any other, and the settings are those of :func:`boost`; not one with an
    objective of its own, such as an IWAE, unless by ``{"method": "boost"}``.

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
            ``{"method": "gradient"}`` trains a stage that has its own algorithm, or could be
            boosted, by one fit.
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
        >>> import torch
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
    train = gather(item, item.data, size, evaluate_on, seed)
    gains = [stage_gain(cascade, index, *train, weights=_first(item.weights, train), seed=seed)]
    held_out = None
    if item.validation is not None:
        held_out = gather(item, item.validation, size, evaluate_on, seed)
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
