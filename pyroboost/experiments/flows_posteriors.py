"""Real posteriors: a boosted guide beside Pyro's own at equal time, judged by reference draws."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_uniform, init_to_value
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from torch.distributions import biject_to

from pyroboost.contexts import forked_rng, local_params
from pyroboost.experiments import posterior_guides as guides
from pyroboost.experiments.posterior_guides import BOOSTED, GUIDES, SIZES, Sizes
from pyroboost.experiments.posterior_models import POSTERIORS, Posterior
from pyroboost.experiments.record import claim, measured
from pyroboost.experiments.runner import Findings, Run
from pyroboost.sampling.psis import psis

__all__ = ["posteriors", "verdicts"]

KHAT, ESS, BOUND, EVIDENCE = "k-hat", "ESS, share", "bound", "evidence"
MEANS, SPREADS, SECONDS = "error of means", "error of sd", "seconds"
WIDTHS = "error of widths"
_ENDS = (0.05, 0.95)
_EXACT_WIDTH = 0.91  # sd of the width of a normal law over 1 / sqrt(draws), relative to it
_FAR = 1e6
_NONE = 10.0  # in place of a k-hat that is not finite


# Judging


@torch.no_grad()
def _judge(
    guide: Any, score: Callable[[Tensor], Tensor], reference: Tensor, ess: float, sizes: Sizes
) -> dict[str, tuple[float, float | None]]:
    tails, shares, bounds, evidences, draws = [], [], [], [], []
    for _ in range(sizes.repeats):
        u, log_q = guides.draw(guide, sizes.draws)
        log_w = (score(u) - log_q).double().nan_to_num(nan=-math.inf, posinf=-math.inf)
        k = float(psis(log_w).pareto_k)
        tails.append(min(_NONE, k) if math.isfinite(k) else (_NONE if k > 0 else -1.0))
        shares.append(float(1 / log_w.softmax(0).square().sum()) / sizes.draws)
        bounds.append(float(log_w.clamp(min=-_FAR).mean()))
        evidences.append(float(log_w.logsumexp(0)) - math.log(sizes.draws))
        draws.append(u)
    every, sd = torch.cat(draws).double(), reference.std(0)
    mean = ((every.mean(0) - reference.mean(0)) / sd).square().mean().sqrt()
    spread = (every.std(0) / sd - 1).square().mean().sqrt()
    found = {KHAT: tails, ESS: shares, BOUND: bounds, EVIDENCE: evidences}
    judged: dict[str, tuple[float, float | None]] = {m: _mean(v) for m, v in found.items()}
    width = ((_width(every) / _width(reference)).log().square()).mean().sqrt()
    noise = {MEANS: 1 / math.sqrt(ess), SPREADS: None, WIDTHS: _EXACT_WIDTH / math.sqrt(ess)}
    for (metric, own), e in zip(noise.items(), (mean, spread, width), strict=True):
        judged[metric] = float(e.nan_to_num(nan=_FAR).clamp(max=_FAR)), own
    return judged


def _width(draws: Tensor) -> Tensor:
    """Return how wide the central 90 per cent of each coordinate are, (D)."""
    low, high = draws.quantile(draws.new_tensor(_ENDS), dim=0)
    return high - low


def _mean(values: list[float]) -> tuple[float, float]:
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) / math.sqrt(len(values))


@dataclass
class _Nuts:
    """Runs NUTS, and remembers how well its chains mixed."""

    sizes: Sizes
    judged: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    rhat: float = 1.0
    ess: float = math.inf

    def __call__(self, model: Callable[..., Any], data: Any, **start: Tensor) -> dict[str, Tensor]:
        begin = init_to_value(values=start, fallback=init_to_uniform(radius=1.0))
        chains = []
        for _ in range(self.sizes.chains):
            kernel = NUTS(
                model,
                target_accept_prob=0.9,
                init_strategy=begin,
                max_plate_nesting=1,
                max_tree_depth=self.sizes.depth,
            )
            mcmc = MCMC(kernel, self.sizes.samples, self.sizes.warmup, disable_progbar=True)
            mcmc.run(*data)
            chains.append(mcmc.get_samples())
        grouped = {n: torch.stack([c[n] for c in chains]) for n in chains[0]}
        seen = self.judged(grouped).values()
        self.rhat = max(float(split_gelman_rubin(v).max()) for v in seen)
        self.ess = min(float(effective_sample_size(v).min()) for v in seen)
        return {name: value.flatten(0, 1) for name, value in grouped.items()}


def _reference(guide: Any, posterior: Posterior, data: Any, nuts: _Nuts, seed: int) -> Tensor:
    """Return reference draws of the unconstrained vector, (S, D)."""
    found = posterior.reference(nuts, data, torch.Generator().manual_seed(seed))
    parts = []
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        free = biject_to(site["fn"].support).inv(found[name].detach())
        parts.append(free.reshape(len(free), -1))
    return torch.cat(parts, 1).double()


# The table


def _kept(run: Run, name: str, sizes: Sizes, seed: int) -> list[dict[str, Any]]:
    """Measure, or take what an interrupted run has left."""
    path = run.checkpoints(f"seed{seed}") / f"{name.replace(' ', '-')}.json"
    if path.exists():
        held: list[dict[str, Any]] = json.loads(path.read_text())
        return held
    rows = _measure(run, name, sizes, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(rows))
    part.replace(path)
    return rows


def _measure(run: Run, name: str, sizes: Sizes, seed: int) -> list[dict[str, Any]]:
    posterior = POSTERIORS[name]
    data = posterior.data(torch.Generator().manual_seed(1))
    with forked_rng(seed), local_params():
        guide, seconds = guides.boosted(posterior, data, sizes, seed)
        nuts = _Nuts(sizes, posterior.judged)
        reference = _reference(guide, posterior, data, nuts, seed)
        score = partial(_score, guide, data)
        trained = {BOOSTED: (guide, seconds)}
        for rival in GUIDES[:-1]:
            other, began = guides.rival(rival, posterior.model), time.process_time()
            guides.train(other, posterior.model, data, seconds, sizes)
            trained[rival] = other, time.process_time() - began
        rows = []
        for label in GUIDES:
            one, spent = trained[label]
            ess = min(nuts.ess, len(reference))
            judged = _judge(one, score, reference, ess, sizes) | {SECONDS: (spent, None)}
            rows += [_row(f"{name}: {label}", metric, *pair) for metric, pair in judged.items()]
            run.say(
                f"{name}, {label}: k-hat {judged[KHAT][0]:.2f}, bound {judged[BOUND][0]:.2f}, "
                f"errors {judged[MEANS][0]:.2f} and {judged[WIDTHS][0]:.2f}, {spent:.0f} s"
            )
    if math.isfinite(nuts.ess):
        label = f"{name}: NUTS"
        rows += [_row(label, "R-hat, largest", nuts.rhat, None)]
        rows += [_row(label, "ESS, least", nuts.ess, None)]
        run.say(f"{label}: R-hat {nuts.rhat:.3f}, ESS {nuts.ess:.0f}")
    return rows


def _score(guide: Any, data: Any, points: Tensor) -> Tensor:
    found: Tensor = guide.log_density(points, *data)
    return found


def _row(name: str, metric: str, value: float, error: float | None) -> dict[str, Any]:
    kind = {BOUND: "bound", EVIDENCE: "estimate"}.get(metric, "measure")
    units = {BOUND: "nats", EVIDENCE: "nats", ESS: "share", SECONDS: "s"}
    units |= {MEANS: "reference sd", SPREADS: "reference sd", WIDTHS: "log ratio"}
    return measured(name, metric, value, std_error=error, kind=kind, unit=units.get(metric, ""))


def verdicts(rows: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Check what the boosted guide is expected to be.

    Args:
        rows: the table's rows.
        names: the posteriors.

    Returns:
        The claims.
    """
    table = {(row["name"], row["metric"]): (row["value"], row["std_error"]) for row in rows}

    def best(metric: str, sign: float) -> tuple[bool, str]:
        lost, won, clear, beaten = [], 0, 0, 0
        for name in names:
            found = {g: table[f"{name}: {g}", metric] for g in GUIDES}
            own, error = found.pop(BOOSTED)
            rival = min(found, key=lambda g: sign * found[g][0])
            other, its_error = found[rival]
            gap, noise = sign * (other - own), 2 * math.hypot(error or 0.0, its_error or 0.0)
            clear, beaten = clear + (gap > noise), beaten + (-gap > noise)
            if gap > 0:
                won += 1
            else:
                lost.append(f"{name} ({rival} {other:.2f}, boosted {own:.2f})")
        told = f"{won} of {len(names)}, {clear} of them by more than twice the error of the draws"
        where = f"; not on {', '.join(lost)}, {beaten} of them as clear" if lost else ""
        return 2 * won > len(names) and clear > beaten, told + where

    claims = []
    for text, metric, sign in (
        ("the boosted guide's k-hat is the lowest on most posteriors", KHAT, 1.0),
        ("its bound is the highest on most posteriors", BOUND, -1.0),
        ("its means are the nearest to the reference's on most", MEANS, 1.0),
        ("its central 90 per cent are the nearest to the reference's width on most", WIDTHS, 1.0),
    ):
        claims.append(claim(text, *best(metric, sign)))
    return claims


Values = dict[str, list[float]]


def _chart(path: Path, labels: tuple[str, ...], panels: dict[str, tuple[Values, float]]) -> None:
    """Draw a dot for every guide on a row for every posterior, in a panel for every metric."""
    from matplotlib.figure import Figure

    size = (4.2 * len(panels), 0.4 * len(labels) + 1.4)
    figure = Figure(figsize=size, layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (metric, (values, most)) in zip(row, panels.items(), strict=True):
        for colour, (guide, found) in enumerate(values.items()):
            marker = "D" if guide == BOOSTED else "o"
            shown = [min(most, value) for value in found]
            axes.plot(shown, range(len(labels)), marker, color=f"C{colour}", label=guide, ms=5)
        axes.set_xlabel(f"{metric} (above {most:g}: drawn there)", fontsize=7)
        axes.tick_params(axis="x", labelsize=7)
    row[0].axvline(0.7, color="0.7", linewidth=1, zorder=0)
    row[0].set_yticks(range(len(labels)), labels, fontsize=7)
    row[0].invert_yaxis()
    row[-1].legend(fontsize=6)
    figure.savefig(path, dpi=150)


def _column(rows: list[dict[str, Any]], names: tuple[str, ...], metric: str) -> Values:
    """Return a metric by guide, for one posterior after another."""
    found = {(row["name"], row["metric"]): row["value"] for row in rows}
    return {guide: [found[f"{name}: {guide}", metric] for name in names] for guide in GUIDES}


def posteriors(run: Run) -> Findings:
    """Real posteriors: k-hat, ESS, bound and errors of five guides trained for the same time."""
    sizes = SIZES[run.scale]
    rows: list[dict[str, Any]] = []
    for name in sizes.posteriors:
        rows += _kept(run, name, sizes, run.seeds[0])
    metrics = {KHAT: 2.0, MEANS: 1.0, WIDTHS: 1.0}
    chart = {m: (_column(rows, sizes.posteriors, m), most) for m, most in metrics.items()}
    draw: Callable[[Path], None] = partial(_chart, labels=sizes.posteriors, panels=chart)
    return Findings(
        data="eight schools as published; the others drawn from their own generators",
        settings=asdict(sizes),
        assumed=[
            f"every guide has the processor time, on one thread, that the boosted one took with "
            f"{sizes.components} components of {sizes.steps} steps, start, proposals, weights, "
            "fine-tuning and checks included",
            f"rivals: Adam at 0.01 with a cosine to 0 over that time, {sizes.particles} particles "
            "in one pass as for the boosted guide, gradients clipped at 100; IAF: two steps of 32, "
            "32 units; spline coupling: four of 32 units with reversals between them",
            f"boosted: the default flow of `AutoBoostedFlow` and the defaults of `boost` but "
            f"{sizes.finetune} passes of fine-tuning; flow and steps were chosen with another seed "
            "on five of these posteriors, after earlier tables with smaller ones",
        ],
        rows=rows,
        shown=[KHAT, ESS, BOUND, MEANS, WIDTHS, SPREADS, SECONDS],
        claims=verdicts(rows, sizes.posteriors),
        notes=[
            f"k-hat, ESS and bound are means over {sizes.repeats} sets of {sizes.draws:,} draws; "
            f"a k-hat that is not finite counts as {_NONE:.0f}",
            "errors are root mean squares over the unconstrained coordinates: those of means in "
            "standard deviations of the reference, those of sd relative to it, those of widths of "
            "the logarithm of the ratio of the central 90 per cent's; their ± is about what so "
            "many reference draws (the least ESS of NUTS) would leave of a perfect guide",
            "the funnel's standard deviations rest on a few far draws of 20,000: a perfect guide "
            "would be off by 0.15 in the median, so that widths are what to read there",
            "k-hat cannot see a mode that no draw reached: read it beside the errors",
            "a claim holds if the boosted guide is first on more than half, and clearly first on "
            "more than it is clearly beaten",
            "each guide is trained once: errors do not tell what another training would give",
            "references: "
            + "; ".join(f"{name}: {POSTERIORS[name].words}" for name in sizes.posteriors),
        ],
        draw=draw,
    )
