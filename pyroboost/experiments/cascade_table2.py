"""Cascaded meta-models, Table 2: a Gaussian mixture on top of advanced models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from pyroboost.compose import Cascade
from pyroboost.experiments import parts
from pyroboost.experiments.cascade import BOUND, LIKELIHOOD, draw, pooled
from pyroboost.experiments.parts import Images, Training
from pyroboost.experiments.record import claim, measured, over_seeds
from pyroboost.experiments.runner import Findings, Run
from pyroboost.metamodel import MetaModel
from pyroboost.models import GMM, IWAE, LVAE, ConvVAE

__all__ = ["MODELS", "Sizes", "table2", "verdicts"]

SECONDS, SHARE, GAIN = "extra time", "extra time, share of training", "L_2, test"
MODELS: dict[str, tuple[float, float, float]] = {
    "ConvVAE": (-88.41, -87.42, 7.85),
    "LVAE, 2-layer": (-95.73, -95.50, 11.76),
    "IWAE, k = 5": (-81.58, -80.38, 9.41),
    "IWAE, k = 10": (-80.56, -79.20, 8.39),
}
"""Rows of the table: the paper's bound alone, with a mixture on top, and the extra seconds."""


@dataclass(frozen=True)
class Sizes:
    """Sizes and lengths.

    Args:
        training: how each of the models is trained, by its row.
        units: width of the IWAEs' two deterministic layers, and of the ConvVAE's one.
        ladder: width of the LVAE's four deterministic layers.
        channels: channels of the ConvVAE.
        latent: latent dimensions of ConvVAE and IWAE.
        latents: those of the LVAE's stochastic layers.
        components: components of the mixture.
        restarts: starts of its EM.
        bound_samples: draws per test image for the bound.
        importance_samples: samples per test image for the likelihood.
    """

    training: dict[str, Training] = field(default_factory=dict)
    units: int = 500
    ladder: int = 1000
    channels: tuple[int, ...] = (32, 64, 128, 256)
    latent: int = 50
    latents: tuple[int, ...] = (30, 30)
    components: int = 10
    restarts: int = 1
    bound_samples: int = 5
    importance_samples: int = 100


def _lengths(*epochs: int, warm_up: float, patience: int | None = None) -> dict[str, Training]:
    return {
        name: Training(
            epochs=count, patience=patience, annealing=warm_up if name.startswith("LVAE") else None
        )
        for name, count in zip(MODELS, epochs, strict=True)
    }


SIZES: dict[str, Sizes] = {
    "smoke": Sizes(
        _lengths(1, 1, 1, 1, warm_up=1),
        units=16,
        ladder=16,
        channels=(4, 8),
        latent=4,
        latents=(4, 3),
        components=3,
        bound_samples=2,
        importance_samples=5,
    ),
    "cpu": Sizes(
        _lengths(8, 12, 15, 15, warm_up=6),
        importance_samples=20,
    ),
    "paper": Sizes(
        _lengths(500, 1000, 500, 500, warm_up=200, patience=50),
        restarts=4,
        importance_samples=1000,
    ),
}


def _build(name: str, found: Images, sizes: Sizes) -> MetaModel:
    dim = found.train.shape[1]
    if name == "ConvVAE":
        return ConvVAE(
            dim,
            sizes.latent,
            image_shape=(1, *found.shape),
            channels=sizes.channels,
            units=sizes.units,
        )
    if name.startswith("LVAE"):
        return LVAE(dim, sizes.latents, units=sizes.ladder, layers=2)
    return IWAE(dim, sizes.latent, num_samples=int(name.split()[-1]), units=sizes.units)


@dataclass(frozen=True)
class _Result:
    """What one seed of one row found: value and standard error by metric."""

    alone: dict[str, tuple[float, float]]
    boosted: dict[str, tuple[float, float]]
    seconds: tuple[float, float]  # of the mixture, of the model below it
    pictures: Tensor


def _measure(run: Run, name: str, found: Images, sizes: Sizes, seed: int) -> _Result:
    base = parts.seeded(seed, partial(_build, name, found, sizes))
    top = parts.seeded(seed, partial(GMM, sizes.components, _latent(base)))
    training = sizes.training[name]
    cascade = Cascade(base, top)
    folder = "".join(c for c in name if c.isalnum())
    boosted = parts.train(
        run,
        cascade,
        found,
        training,
        seed=seed,
        folder=folder,
        stages={1: {"restarts": sizes.restarts}},
    )
    below, above = boosted.stages
    history = below.fit.history
    terms = parts.bounds(cascade, found.test, seed=seed, num_samples=sizes.bound_samples)
    sums = terms.partial_sums()
    judged: list[dict[str, tuple[float, float]]] = []
    for k, model in enumerate((Cascade(base), cascade)):
        likelihood = parts.importance_likelihood(
            model, found.test, seed=seed, num_samples=sizes.importance_samples
        )
        judged.append({BOUND: sums[k], LIKELIHOOD: (likelihood.mean, likelihood.standard_error)})
    judged[1][GAIN] = terms.terms[1].value, terms.terms[1].std_error
    # A fit that was taken up from a checkpoint knows the seconds of the epochs before it.
    seconds = above.seconds, sum(row["seconds"] for row in history)
    run.say(
        f"seed {seed}, {name}: {sums[0][0]:.2f}, with a mixture {sums[1][0]:.2f} nats, "
        f"{seconds[0]:.1f} s on top of {seconds[1]:.0f} s"
    )
    return _Result(judged[0], judged[1], seconds, parts.mean_images(cascade, 64, seed=seed))


def _latent(base: MetaModel) -> int:
    assert base.hidden_shape is not None
    return math.prod(base.hidden_shape)


def _rows(name: str, results: list[_Result]) -> list[dict[str, Any]]:
    alone, boosted, seconds = MODELS[name]
    kinds = {BOUND: "bound", LIKELIHOOD: "estimate", GAIN: "bound"}
    rows = []
    for label, paper, runs in (
        (name, alone, [r.alone for r in results]),
        (f"{name} + GMM", boosted, [r.boosted for r in results]),
    ):
        for metric in runs[0]:
            rows.append(
                over_seeds(
                    label,
                    metric,
                    [one[metric] for one in runs],
                    kind=kinds[metric],
                    paper=paper if metric == BOUND else None,
                )
            )
    label = f"{name} + GMM"
    extra = sum(r.seconds[0] for r in results) / len(results)
    share = sum(r.seconds[0] for r in results) / sum(r.seconds[1] for r in results)
    rows.append(
        measured(label, SECONDS, extra, std_error=None, kind="measure", unit="s", paper=seconds)
    )
    rows.append(measured(label, SHARE, share, std_error=None, kind="measure", unit="share"))
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check what section 4.3 says of Table 2.

    Args:
        rows: the table's rows.

    Returns:
        The claims.
    """
    read = partial(pooled, rows)

    claims = []
    for name in MODELS:
        value, error = read(f"{name} + GMM", GAIN)
        alone, boosted, _ = MODELS[name]
        claims.append(
            claim(
                f"{name}: a mixture on top raises the lower bound on test data",
                value > 2 * error,
                f"L_2 = {value:.2f} ± {error:.2f} nats; the paper's is {boosted - alone:.2f}",
            )
        )
    seconds = {name: read(f"{name} + GMM", SECONDS)[0] for name in MODELS}
    shares = {name: read(f"{name} + GMM", SHARE)[0] for name in MODELS}
    claims.append(
        claim(
            "the mixture costs a few seconds: less than 5 % of the time of the model below it",
            max(shares.values()) < 0.05,
            ", ".join(f"{n}: {s:.1f} s ({100 * shares[n]:.1f} %)" for n, s in seconds.items()),
        )
    )
    order = sorted(MODELS, key=lambda name: read(name, BOUND)[0])
    paper = sorted(MODELS, key=lambda name: MODELS[name][0])
    claims.append(
        claim(
            f"order of the bounds of the models alone: {', '.join(paper)}",
            order == paper,
            ", ".join(f"{name}: {read(name, BOUND)[0]:.2f}" for name in order),
        )
    )
    return claims


def table2(run: Run) -> Findings:
    """Table 2: ConvVAE, LVAE and IWAE, each alone and with a Gaussian mixture on top."""
    sizes, found = SIZES[run.scale], parts.images(run)
    rows: list[dict[str, Any]] = []
    pictures: dict[str, Tensor] = {}
    for name in MODELS:
        results = [_measure(run, name, found, sizes, seed) for seed in run.seeds]
        rows += _rows(name, results)
        pictures[f"{name} + GMM"] = results[0].pictures
    lengths = ", ".join(f"{name} {t.epochs}" for name, t in sizes.training.items())
    warm = next(t.annealing for n, t in sizes.training.items() if n.startswith("LVAE"))
    figure: Callable[..., None] = partial(draw, pictures=pictures, shape=found.shape)
    return Findings(
        data=found.words,
        settings=asdict(sizes),
        assumed=[
            *parts.ASSUMED,
            f"epochs at most: {lengths}; the paper gives none",
            f"channels of the ConvVAE: {'-'.join(map(str, sizes.channels))}; the paper's are "
            "32-64-128-256",
            f"LVAE: two deterministic layers of {sizes.ladder} before each of its two stochastic "
            f"layers (the paper's are 1,000 wide), warm-up over {warm} epochs",
            f"the mixture has full covariances and is fitted by EM, {sizes.restarts} start(s)",
        ],
        rows=rows,
        shown=[BOUND, LIKELIHOOD, GAIN, SECONDS],
        claims=verdicts(rows),
        notes=[
            "the bound of an IWAE is its own, with k importance samples per image; with a mixture "
            "on top, the mixture's term is taken over the self-normalised law of those samples",
            f"log-likelihoods are importance-sampled, {sizes.importance_samples} samples an image, "
            "and low by the logarithm's bias",
        ],
        draw=figure,
    )
