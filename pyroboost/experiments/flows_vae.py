"""Gradient boosted flows, Table 1: VAEs with posteriors of many kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pyroboost.experiments import flows_vae_models as models
from pyroboost.experiments import parts
from pyroboost.experiments.figures import sample_grids
from pyroboost.experiments.flows_vae_models import Judged
from pyroboost.experiments.flows_vae_settings import (
    MODELS,
    PAPER,
    Kind,
    Pictures,
    Sizes,
    pictures,
    sizes_of,
)
from pyroboost.experiments.record import claim, over_seeds
from pyroboost.experiments.runner import Findings, Run

__all__ = ["assumed", "table1", "verdicts"]

BOUND, MIXTURE, NLL = "-ELBO, test", "-ELBO of the whole mixture, test", "NLL, test"
USED, SECONDS = "components in use", "training time"
_SHARED = (
    "RealNVP, GBF and GBF+ have one decoder, so that their likelihood is the same: what their NLL "
    "differ by is the bias of the estimate, which a better posterior makes smaller, and they are "
    "compared by their bounds"
)


@dataclass(frozen=True)
class _Result:
    """What one model of one seed came to."""

    judged: Judged
    seconds: float
    picture: Tensor


def _result(
    run: Run, name: str, pair: Any, found: Pictures, sizes: Sizes, seed: int, seconds: float
) -> _Result:
    judged = models.judge(pair, found.test, sizes, seed=seed)
    run.say(
        f"seed {seed}, {name}: -ELBO {judged.bound.mean():.2f}, NLL "
        f"{judged.likelihood.mean():.2f} nats, {seconds:.0f} s"
        + (f", {judged.used} components" if name.startswith("GBF") else "")
    )
    return _Result(judged, seconds, parts.mean_images(pair, 64, seed=seed))


def _one_seed(run: Run, found: Pictures, sizes: Sizes, seed: int) -> dict[str, _Result]:
    results = {}
    for name in MODELS[:-2]:  # the last of them is RealNVP
        pair, seconds = models.trained(run, name, found, sizes, seed)
        results[name] = _result(run, name, pair, found, sizes, seed, seconds)
    first = (pair, seconds) if sizes.frozen else None
    pair, report, seconds = models.boosted(run, found, sizes, seed, first=first)
    run.say(report.table())
    results["GBF"] = _result(run, "GBF", pair, found, sizes, seed, seconds)
    more = models.finetuned(run, pair, found, sizes, seed)
    run.say(more.table())
    seconds += models.seconds_of(more)
    results["GBF+"] = _result(run, "GBF+", pair, found, sizes, seed, seconds)
    return results


def _mean(values: Tensor, unit: float) -> tuple[float, float]:
    scaled = values.double() / unit
    return float(scaled.mean()), float(scaled.std()) / math.sqrt(len(scaled))


def _rows(
    runs: Sequence[dict[str, _Result]], kind: Kind, unit: float, word: str
) -> list[dict[str, Any]]:
    rows = []
    for name in MODELS:
        own = [one[name] for one in runs]
        bound, nll = PAPER[kind][name]
        add = partial(over_seeds, name, unit=word)
        pairs = [_mean(r.judged.paper, unit) for r in own]
        rows.append(add(BOUND, pairs, kind="bound", paper=bound))
        if name.startswith("GBF"):
            pairs = [_mean(r.judged.bound, unit) for r in own]
            rows.append(add(MIXTURE, pairs, kind="bound"))
        pairs = [_mean(r.judged.likelihood, unit) for r in own]
        rows.append(add(NLL, pairs, kind="estimate", paper=nll))
        if name.startswith("GBF"):
            counts = [(float(r.judged.used), None) for r in own]
            rows.append(over_seeds(name, USED, counts, kind="measure", unit="components"))
        times = [(r.seconds, None) for r in own]
        rows.append(over_seeds(name, SECONDS, times, kind="measure", unit="s"))
    return rows


def _better(
    runs: Sequence[dict[str, Judged]], one: str, other: str, measure: str = "likelihood"
) -> tuple[float, float]:
    """Return by how many nats one model is below another, image by image, with its error."""
    pairs = [(getattr(run[one], measure), getattr(run[other], measure)) for run in runs]
    gains = [theirs.double() - ours.double() for ours, theirs in pairs]
    means = [float(gain.mean()) for gain in gains]
    error = sum(float(g.std()) / math.sqrt(len(g)) for g in gains) / len(gains)
    mean = sum(means) / len(means)
    if len(means) > 1:
        spread = sum((m - mean) ** 2 for m in means) / (len(means) - 1) / len(means)
        error = math.hypot(error, math.sqrt(spread))
    return mean, error


def verdicts(
    runs: Sequence[dict[str, Judged]],
    kind: Kind,
    *,
    unit: float = 1.0,
    word: str = "nats",
    frozen: bool = False,
) -> list[dict[str, Any]]:
    """Check what the paper says of Table 1.

    Args:
        runs: what each model came to, a seed each.
        kind: the data.
        unit: nats in the table's unit.
        word: the table's unit.
        frozen: whether RealNVP, GBF and GBF+ share one decoder. Then they have one likelihood,
            and are compared by their bounds.

    Returns:
        The claims; differences are taken image by image.
    """
    compare: Callable[..., tuple[float, float]] = partial(_better, runs)
    measure, what = ("bound", "the mixture's -ELBO") if frozen else ("likelihood", "NLL")

    def told(pair: tuple[str, str], gain: tuple[float, float], what: str = "NLL") -> str:
        sign = "below" if gain[0] >= 0 else "above"
        value, error = abs(gain[0]) / unit, gain[1] / unit
        return f"{what} of {pair[0]} is {value:.3f} ± {error:.3f} {word} {sign} that of {pair[1]}"

    def lower(text: str, one: str, other: str) -> dict[str, Any]:
        gain = _better(runs, one, other, measure)
        return claim(text, gain[0] > 2 * gain[1], told((one, other), gain, what) + own(one, other))

    def own(one: str, other: str) -> str:
        if not frozen:
            return ""
        gap = compare(one, other, "paper")[0] / unit
        sign = "below" if gap >= 0 else "above"
        return (
            f"; by the paper's bound, each draw scored by its own component, {abs(gap):.3f} {sign}"
        )

    gain = _better(runs, "GBF", "RealNVP", measure)
    used = min(run["GBF"].used for run in runs)
    claims = [
        claim(
            "boosting improves RealNVP",
            gain[0] > 2 * gain[1] and used > 1,
            told(("GBF", "RealNVP"), gain, what)
            + own("GBF", "RealNVP")
            + f"; {used} component{'s' if used > 1 else ''} in use",
        ),
        lower("fine-tuning improves the boosted model further", "GBF+", "GBF"),
    ]
    if kind == "frey":
        rest = {name: compare("GBF+", name) for name in MODELS[: -3 if frozen else -2]}
        closest = min(rest, key=lambda name: rest[name][0])
        claims.append(
            claim(
                "boosted RealNVP gives the best likelihood of all models"
                + (", RealNVP with its decoder apart" if frozen else ""),
                all(gain[0] > 2 * gain[1] for gain in rest.values()),
                told(("GBF+", closest), rest[closest]),
            )
        )
    elif kind == "caltech":
        pairs = [(a, b) for a in ("Planar", "Radial", "Sylvester") for b in ("GBF", "IAF")]
        gains = {pair: compare(*pair) for pair in pairs}
        closest_pair = min(gains, key=lambda pair: gains[pair][0])
        claims.append(
            claim(
                "planar, radial and Sylvester are better than boosted RealNVP and IAF",
                all(gain[0] > 2 * gain[1] for gain in gains.values()),
                told(closest_pair, gains[closest_pair]),
            )
        )
    else:
        gain = compare("GBF", "Sylvester")
        claims.append(
            claim(
                "boosted RealNVP is on par with Sylvester: less than a nat apart",
                abs(gain[0]) + 2 * gain[1] < 1.0,
                told(("GBF", "Sylvester"), gain),
            )
        )
    return claims


def assumed(sizes: Sizes, found: Pictures) -> list[str]:
    """Say what the paper leaves open or what differs from it."""
    if sizes.network == "gated":
        channels = "-".join(map(str, (*sizes.channels, *sizes.decoder_channels)))
        network = (
            f"gated convolutions with {channels} channels (the paper's are 16-32-256-32-16-16) and "
            "the nearest strides and paddings that fit, as the printed ones do not"
        )
    else:
        network = (
            f"dense networks of {sizes.layers} layers of {sizes.width} in place of the paper's "
            "gated convolutions"
        )
    grey = (
        [
            f"likelihood of the {found.levels} grey levels: a discretised logistic law, location "
            "and scale of every pixel from the decoder; the paper does not name its own"
        ]
        if found.levels
        else []
    )
    return [
        network,
        *grey,
        f"{sizes.latent} latent dimensions (the paper's 64); planar, radial and Sylvester of "
        f"{sizes.steps} steps (16), Sylvester with {sizes.vectors} orthogonal vectors (32); IAF, "
        f"RealNVP and each component of {sizes.couplings} steps (8) with {sizes.units} units (256 "
        f"or 512); {sizes.components} components (4)",
        f"{sizes.first} epochs for the first component, {sizes.epochs} for each further one, and "
        f"{sizes.total} for models that are not boosted, so that all networks train for as many; "
        "the paper gives a component and a model 1,000 each. KL annealed over the first quarter "
        f"of each stage that trains networks; fine-tuning for {sizes.finetune} epochs a component "
        "(50)",
        "Adam at 0.001 with cosine decay to 0 over each stage (the paper halves it on plateaus), "
        f"batches of {sizes.batch_size}; the weights with the best held-out bound are kept",
        _boosting(sizes),
        "a component without a gain on held-out data is dropped; weights are solved for on the "
        "simplex",
    ]


def _boosting(sizes: Sizes) -> str:
    if not sizes.frozen and sizes.objective == "mixture":
        return (
            "a new component, encoder and decoder are trained by the bound of the whole mixture "
            "with it at weight 1/c, by draws from every component; with the paper's objective "
            "(Eq. 11) rounds of so few epochs left the networks worse, and were put back"
        )
    if not sizes.frozen:
        return (
            "a new component is trained against the exact density of the fixed mixture (Eq. 11), "
            "and encoder and decoder with it"
        )
    return (
        "GBF starts from the trained RealNVP, whose encoder and decoder stay as they are: the two "
        "differ by boosting alone; a new component is trained by the gradient of the mixture's own "
        "bound at weight 1/c, with Adam at 0.005 and without annealing"
    )


def _draw(path: Path, *, grids: dict[str, Tensor], shape: tuple[int, ...], faces: bool) -> None:
    """Draw samples side by side; grey levels as they are, bits as ink."""
    shown = {name: 1.0 - grid if faces else grid for name, grid in grids.items()}
    sample_grids(path, shown, shape)


def table1(run: Run, *, kind: Kind) -> Findings:
    """Table 1: VAEs with normal, flow and boosted posteriors on one data set."""
    sizes, found = sizes_of(kind, run.scale), pictures(run, kind)
    unit, word = (found.dim * math.log(2), "bits/dim") if found.levels else (1.0, "nats")
    runs = [_one_seed(run, found, sizes, seed) for seed in run.seeds]
    rows = _rows(runs, kind, unit, word)
    grids = {name: result.picture for name, result in runs[0].items()}
    shown = {name: grids[name] for name in ("VAE", "Sylvester", "RealNVP", "GBF+")}
    judged = [{name: result.judged for name, result in one.items()} for one in runs]
    return Findings(
        data=found.words,
        settings=asdict(sizes),
        assumed=assumed(sizes, found),
        rows=rows,
        shown=[BOUND, MIXTURE, NLL, USED, SECONDS],
        claims=verdicts(judged, kind, unit=unit, word=word, frozen=sizes.frozen),
        notes=[
            f"-ELBO is the mean of {3 * sizes.components} draws an image, or of 3 from each "
            "component in use, each scored by the component that drew it, as in the paper; scored "
            "by the whole mixture the same draws give the lower number beside it, a bound too",
            f"NLL is importance-sampled, {sizes.importance} samples an image with the whole "
            "mixture as proposal, and high by the logarithm's bias",
            *([_SHARED] if sizes.frozen else []),
            *(
                [
                    "each model is trained once: ± is over images, and another training may differ "
                    "by as much or more"
                ]
                if len(run.seeds) == 1
                else []
            ),
            *(["numbers are bits per dimension"] if found.levels else []),
        ],
        draw=partial(_draw, grids=shown, shape=found.shape, faces=found.levels > 0),
    )
