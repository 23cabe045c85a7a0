"""Cascaded meta-models, Table 1 on MNIST, and what its Figure 4 shares with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pyroboost.compose import Cascade
from pyroboost.experiments import parts
from pyroboost.experiments.figures import sample_grids
from pyroboost.experiments.parts import Images, Training
from pyroboost.experiments.record import claim, over_seeds
from pyroboost.experiments.runner import Findings, Run
from pyroboost.metamodel import MetaModel
from pyroboost.models import VAE

__all__ = [
    "BOUND",
    "CLEAR",
    "GREY",
    "LIKELIHOOD",
    "SMOKE",
    "VAES",
    "Sizes",
    "draw",
    "judge",
    "notes",
    "pooled",
    "real_share",
    "rows_of",
    "table1",
    "tower",
]

BOUND, LIKELIHOOD = "lower bound, test", "log-likelihood, test"
CLEAR, GREY = "distinguishable samples", "grey pixels of samples"


@dataclass(frozen=True)
class Sizes:
    """Sizes and lengths of an experiment with VAEs.

    Args:
        training: how each VAE is trained.
        units: width of the deterministic layers.
        wide_units: the same in the wider VAE of Figure 4.
        layers: deterministic layers of encoder and decoder each.
        deep_layers: the same in the deeper VAE.
        latent: latent dimensions.
        stages: VAEs in the cascade.
        bound_samples: draws per test image for the bound.
        importance_samples: samples per test image for the likelihood.
        pictures: images drawn to measure samples.
    """

    training: Training
    units: int = 500
    wide_units: int = 2500
    layers: int = 2
    deep_layers: int = 10
    latent: int = 20
    stages: int = 2
    bound_samples: int = 5
    importance_samples: int = 100
    pictures: int = 2000


SMOKE = Sizes(
    Training(epochs=2),
    units=32,
    wide_units=64,
    deep_layers=3,
    latent=4,
    bound_samples=2,
    importance_samples=5,
    pictures=64,
)
TABLE1: dict[str, Sizes] = {
    "smoke": SMOKE,
    "cpu": Sizes(Training(epochs=20)),
    "paper": Sizes(Training(epochs=200, patience=20), importance_samples=1000, pictures=10_000),
}
VAES = "a VAE above another models z by a normal likelihood with learnt location and scale"


def tower(dim: int, sizes: Sizes, *, seed: int) -> list[VAE]:
    """Return VAEs, untrained: one over bits, the others each over the z of the one below.

    Args:
        dim: number of bits.
        sizes: widths and number of VAEs.
        seed: of the initial weights.
    """
    make: Callable[..., VAE] = partial(VAE, units=sizes.units, layers=sizes.layers)

    def build() -> list[VAE]:
        above = range(1, sizes.stages)
        return [
            make(dim, sizes.latent),
            *(make(sizes.latent, sizes.latent, likelihood="gaussian") for _ in above),
        ]

    return parts.seeded(seed, build)


def judge(
    model: MetaModel, found: Images, sizes: Sizes, *, seed: int
) -> dict[str, tuple[float, float]]:
    """Measure a model on test data and its samples: value and standard error by metric."""
    bound = parts.bounds(model, found.test, seed=seed, num_samples=sizes.bound_samples)
    likelihood = parts.importance_likelihood(
        model, found.test, seed=seed, num_samples=sizes.importance_samples
    )
    pictures = parts.mean_images(model, sizes.pictures, seed=seed)
    return {
        BOUND: (bound.elbo, bound.elbo_error),
        LIKELIHOOD: (likelihood.mean, likelihood.standard_error),
        CLEAR: parts.share(parts.distinguishable(pictures, found.train, found.labels)),
        GREY: parts.share(parts.grey_share(pictures)),
    }


_KINDS = {BOUND: "bound", LIKELIHOOD: "estimate", CLEAR: "measure", GREY: "measure"}


def rows_of(
    name: str, runs: list[dict[str, tuple[float, float]]], paper: float | None
) -> list[dict[str, Any]]:
    """Return a model's rows, its runs with several seeds pooled."""
    return [
        over_seeds(
            name,
            metric,
            [run[metric] for run in runs],
            kind=kind,
            unit="nats" if kind != "measure" else "share",
            paper=paper if metric == BOUND else None,
        )
        for metric, kind in _KINDS.items()
    ]


def pooled(rows: list[dict[str, Any]], name: str, metric: str) -> tuple[float, float]:
    """Return a row's value with its errors over data and seeds together."""
    row = next(r for r in rows if r["name"] == name and r["metric"] == metric)
    return row["value"], math.hypot(row["std_error"] or 0.0, row["seed_error"] or 0.0)


def notes(sizes: Sizes, found: Images, *, real: float) -> list[str]:
    """Return what a reader of the measures must know."""
    return [
        f"log-likelihoods are importance-sampled, {sizes.importance_samples} samples an image, "
        "and low by the logarithm's bias",
        f"distinguishable: nine of an image's ten nearest training images bear one label, which "
        f"holds for {real:.2f} of the test images; grey: probability between 0.1 and 0.9; both "
        f"over {sizes.pictures:,} draws",
    ]


def real_share(found: Images) -> float:
    """Return how many of the test images are distinguishable."""
    test = found.test[:2000]
    return parts.share(parts.distinguishable(test, found.train, found.labels))[0]


def table1(run: Run) -> Findings:
    """Table 1, MNIST: the bound on test data with one and with two VAEs."""
    sizes, found = TABLE1[run.scale], parts.images(run)
    judged: list[list[dict[str, tuple[float, float]]]] = [[], []]
    gains: list[tuple[float, float]] = []
    pictures: dict[str, Tensor] = {}
    for seed in run.seeds:
        cascade = Cascade(*tower(found.train.shape[1], sizes, seed=seed))
        parts.train(run, cascade, found, sizes.training, seed=seed, folder="table1")
        terms = parts.bounds(cascade, found.test, seed=seed, num_samples=sizes.bound_samples).terms
        gains.append((terms[1].value, terms[1].std_error))
        for k, results in enumerate(judged, 1):
            results.append(judge(cascade[:k], found, sizes, seed=seed))
            drawn = parts.mean_images(cascade[:k], 64, seed=seed)
            pictures.setdefault(f"k = {k}", drawn)
        run.say(f"seed {seed}: {', '.join(f'{r[-1][BOUND][0]:.2f}' for r in judged)} nats")
    rows = [*rows_of("k = 1", judged[0], -102.51), *rows_of("k = 2", judged[1], -100.44)]
    gain = over_seeds("k = 2", "L_2, test", gains, kind="bound")
    gain_error = math.hypot(gain["std_error"], gain["seed_error"] or 0.0)
    one, two = (pooled(rows, f"k = {k}", CLEAR) for k in (1, 2))
    claims = [
        claim(
            "a second VAE raises the lower bound on test data (Table 1)",
            gain["value"] > 2 * gain_error,
            f"L_2 = {gain['value']:.2f} ± {gain_error:.2f} nats; the paper's is 2.07",
        ),
        claim(
            "a second VAE raises the quality of samples (Figure 3)",
            two[0] - one[0] > 2 * math.hypot(one[1], two[1]),
            f"distinguishable: {one[0]:.3f} ± {one[1]:.3f} of the samples at k = 1, {two[0]:.3f} "
            f"± {two[1]:.3f} at k = 2; a stand-in for the paper's pictures",
        ),
    ]
    return Findings(
        data=found.words,
        settings=asdict(sizes),
        assumed=[*parts.ASSUMED, f"at most {sizes.training.epochs} epochs a stage", VAES],
        rows=[*rows, gain],
        shown=[BOUND, LIKELIHOOD, "L_2, test", CLEAR],
        claims=claims,
        notes=notes(sizes, found, real=real_share(found)),
        draw=partial(draw, pictures=pictures, shape=found.shape),
    )


def draw(path: Path, *, pictures: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """Draw samples side by side."""
    sample_grids(path, pictures, shape)
