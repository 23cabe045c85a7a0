"""Gradient boosted flows, Figure 3: decoder shock, and what blending and fine-tuning do to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroboost.contexts import forked_rng
from pyroboost.experiments import flows_vae_models as models
from pyroboost.experiments.flows_vae import assumed
from pyroboost.experiments.flows_vae_settings import Pictures, Sizes, pictures, sizes_of
from pyroboost.experiments.record import claim, over_seeds
from pyroboost.experiments.runner import Findings, Run, Scale
from pyroboost.guides import BoostedFlowGuide
from pyroboost.infer import Callback
from pyroboost.models import VAE

__all__ = ["Watch", "figure3"]

BLENDS = {"blended": 0.5, "not blended": 0.0}
SHOCK, MEMORY, BOUND = "shock", "rise of the old loss", "-ELBO of the whole mixture, test"
_IMAGES, _DRAWS = 500, 3

Curve = dict[tuple[int, int], tuple[Tensor, Tensor]]


class Watch(Callback):
    """Record held-out losses at every epoch: of the component in training, of the mixture.

    Both are -ELBOs of single images at full weight of the latent terms, the component's scored by
    itself. They are kept in a file, so that an interrupted run loses none.

    Args:
        pair: the model.
        x: held-out images.  # (N, D)
        path: the file.
    """

    def __init__(self, pair: VAE, x: Tensor, path: Path) -> None:
        self.pair, self.x, self.path = pair, x, path
        self.curve: Curve = torch.load(path, weights_only=True) if path.exists() else {}

    def on_start(self, state: Any) -> None:
        """Record where a round starts."""
        if state.epoch <= 1 and not state.history:
            self._record(0)

    def on_epoch(self, state: Any) -> None:
        """Record an epoch."""
        self._record(state.epoch)

    def _record(self, epoch: int) -> None:
        guide: Any = self.pair.guide.fn
        flows = guide.components.flows
        training = [any(p.requires_grad for p in flow.parameters()) for flow in flows]
        c = training.index(True)  # in an ordinary fit of the first, the others stand idle
        weights = guide.components.weights
        kept = weights.clone()
        try:
            with forked_rng(epoch):
                mixture = -models.bounds(self.pair, self.x, draws=_DRAWS, others=_DRAWS)[1]
                weights.copy_(torch.eye(len(weights))[c].to(weights))
                own = -models.bounds(self.pair, self.x, draws=_DRAWS, others=_DRAWS)[1]
        finally:
            weights.copy_(kept)
        self.curve[c, epoch] = own.cpu(), mixture.cpu()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.curve, self.path)


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def _stages(curve: Curve) -> list[int]:
    return sorted({c for c, _ in curve})


def _last(curve: Curve, c: int) -> int:
    return max(epoch for stage, epoch in curve if stage == c)


def _shocks(curve: Curve) -> dict[int, tuple[Tensor, Tensor]]:
    """Return, for each component but the first, image by image, its shock and the rise.

    The shock is the highest loss of the component in its first quarter less the mixture's loss
    before it; the rise is what that mixture's loss has gone up by when the round ends.
    """
    found = {}
    for c in _stages(curve)[1:]:
        last = _last(curve, c)
        before = curve[c, 0][1]
        early = range(1, max(2, last // 4 + 1))
        worst = max((curve[c, e][0] for e in early), key=lambda loss: float(loss.mean()))
        found[c] = worst - before, curve[c, last][1] - before
    return found


def _one(
    run: Run, name: str, found: Pictures, sizes: Sizes, seed: int
) -> tuple[Curve, Curve, tuple[Tensor, Tensor], list[int]]:
    """Boost and fine-tune with or without blending; return curves and test losses."""
    folder = name.replace(" ", "-")
    held_out = found.validation[:_IMAGES]
    watches: list[Watch] = []

    def watch(part: str, pair: VAE) -> Watch:
        path = run.checkpoints(f"seed{seed}", folder, f"watch-{part}.pt")
        watches.append(Watch(pair, held_out, path))
        return watches[-1]

    pair, report, _ = models.boosted(
        run,
        found,
        sizes,
        seed,
        folder=f"{folder}/rounds",
        blend=BLENDS[name],
        watch=partial(watch, "rounds"),
    )
    run.say(f"seed {seed}, {name}:\n{report.table()}")
    guide: BoostedFlowGuide = pair.guide.fn  # type: ignore[assignment]
    with forked_rng(seed):
        before = -models.bounds(pair, found.test, draws=_DRAWS, others=_DRAWS)[1].cpu()
    more = models.finetuned(
        run, pair, found, sizes, seed, folder=f"{folder}/fine", watch=partial(watch, "fine")
    )
    run.say(more.table())
    with forked_rng(seed):
        after = -models.bounds(pair, found.test, draws=_DRAWS, others=_DRAWS)[1].cpu()
    used = guide.components.active
    return watches[0].curve, watches[1].curve, (before, after), used


def _sizes(scale: Scale) -> Sizes:
    """Return Table 1's sizes, with networks that train: the shock is theirs.

    On a CPU rounds are longer and fewer, so that the networks recover within each.
    """
    sizes = replace(sizes_of("caltech", scale), frozen=False, objective="residual")
    if scale != "cpu":
        return sizes
    return replace(sizes, components=3, epochs=100, finetune=25)


def figure3(run: Run) -> Findings:
    """Figure 3: held-out loss by epoch as components come in, with and without blending."""
    sizes = _sizes(run.scale)
    found = pictures(run, "caltech")
    all_seeds = [
        {name: _one(run, name, found, sizes, seed) for name in BLENDS} for seed in run.seeds
    ]
    rows, shocks = [], {}
    for name in BLENDS:
        runs = [one[name] for one in all_seeds]
        each = [_shocks(rounds) for rounds, _, _, _ in runs]
        shocks[name] = each
        for c in sorted({c for one in each for c in one}):
            for k, metric in enumerate((SHOCK, MEMORY)):
                pairs = [_mean(one[c][k]) for one in each if c in one]
                rows.append(over_seeds(name, f"{metric}, component {c + 1}", pairs, kind="measure"))
        for k, label in enumerate((name, f"{name}, fine-tuned")):
            pairs = [_mean(bounds[k]) for _, _, bounds, _ in runs]
            rows.append(over_seeds(label, BOUND, pairs, kind="bound"))
    curves = {name: all_seeds[0][name][:2] for name in BLENDS}
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    gains = [bounds[0] - bounds[1] for one in all_seeds for _, _, bounds, _ in one.values()]
    all_used = [used for one in all_seeds for _, _, _, used in one.values()]
    return Findings(
        data=found.words,
        settings=asdict(sizes),
        assumed=assumed(sizes, found),
        rows=rows,
        shown=metrics,
        claims=_claims(shocks, gains, sizes, all_used),
        notes=[
            f"losses are -ELBOs of {_IMAGES} held-out images at most, at full weight of the latent "
            "terms, as training goes; the shock is the highest loss of a new component in the "
            "first quarter of its round less the loss of the mixture before it, the rise what that "
            "mixture loses by the end of the round, as the networks move on",
            "a component that was dropped and started afresh is shown by its last start",
        ],
        draw=partial(_draw, curves=curves),
    )


def _pooled(values: list[Tensor]) -> tuple[float, float]:
    """Return the mean over rounds and seeds; they share their images, so errors do not fall."""
    each = [_mean(value) for value in values]
    return sum(v for v, _ in each) / len(each), sum(e for _, e in each) / len(each)


def _claims(
    shocks: Mapping[str, list[dict[int, tuple[Tensor, Tensor]]]],
    gains: list[Tensor],
    sizes: Sizes,
    used: list[list[int]],
) -> list[dict[str, Any]]:
    def pooled(name: str, k: int) -> tuple[float, float]:
        return _pooled([pair[k] for one in shocks[name] for pair in one.values()])

    def told(k: int) -> str:
        parts = (f"{v:.2f} ± {e:.2f} nats {name}" for name, (v, e) in both(k).items())
        return ", ".join(parts)

    def both(k: int) -> dict[str, tuple[float, float]]:
        return {name: pooled(name, k) for name in BLENDS}

    def less(k: int) -> tuple[float, float]:
        """Return how much less it is with blending, image by image, where both have a round."""
        pairs = zip(*(shocks[name] for name in BLENDS), strict=True)
        return _pooled([two[c][k] - one[c][k] for one, two in pairs for c in one if c in two])

    without = pooled("not blended", 0)
    mean, error = _pooled(gains)
    (shock, shock_error), (rise, rise_error) = less(0), less(1)
    share = sizes.finetune / sizes.epochs
    idle = sum(len(active) < 2 for active in used)
    counted = f"; components in use: {', '.join(str(len(active)) for active in used)}"
    untested = " (one component is not fine-tuned, so that this tests nothing)" if idle else ""
    return [
        claim(
            "the loss jumps when a new component comes in: decoder shock",
            without[0] > 2 * without[1],
            f"shock {told(0)}",
        ),
        claim(
            "blending in draws from the fixed components lessens the shock",
            shock > 2 * shock_error,
            f"shock {told(0)}; in the rounds that both have {shock:.2f} ± {shock_error:.2f} less",
        ),
        claim(
            "and it helps the decoder remember: the old mixture's loss rises less",
            rise > 2 * rise_error,
            f"rise {told(1)}; in the rounds that both have {rise:.2f} ± {rise_error:.2f} less",
        ),
        claim(
            "a short second pass over the components improves results",
            mean > 2 * error,
            f"-ELBO falls by {mean:.3f} ± {error:.3f} nats on test data, for {share:.0%} of the "
            f"epochs of a round each{counted}{untested}",
        ),
    ]


def _draw(path: Path, *, curves: Mapping[str, tuple[Curve, Curve]]) -> None:
    """Draw held-out losses by epoch, a panel with and one without blending."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(curves), 3.2), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True)
    for axes, (name, (rounds, fine)) in zip(panels, curves.items(), strict=True):
        start = 0
        for part, curve in (("", rounds), (", fine-tuning", fine)):
            for c in _stages(curve):
                last = _last(curve, c)
                epochs = [e for e in range(last + 1) if (c, e) in curve]
                at = [start + e for e in epochs]
                own = [float(curve[c, e][0].mean()) for e in epochs]
                old = [float(curve[c, e][1].mean()) for e in epochs]
                axes.plot(at, own, color=f"C{c}", linewidth=1, label=f"component {c + 1}{part}")
                axes.plot(at, old, color="0.6", linewidth=0.8, linestyle="--")
                start += last
                axes.axvline(start, color="0.9", linewidth=0.6)
        axes.set_title(name, fontsize=8)
        axes.set_xlabel("epoch (dashed: the mixture)", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6)
    panels[0].set_ylabel("-ELBO, held out (nats)", fontsize=7)
    panels[0].set_ylim(top=_top([rounds for rounds, _ in curves.values()]))
    figure.savefig(path, dpi=150)


def _top(curves: list[Curve]) -> float:
    """Return where to cut: above all but the first epochs of the first round."""
    kept = [float(own.mean()) for one in curves for (c, e), (own, _) in one.items() if c or e > 2]
    return 1.05 * max(kept)
