"""Cascaded meta-models, section 4.2 on MNIST: Table 1 and Figure 4."""

from __future__ import annotations

import math
from collections.abc import Mapping
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

__all__ = ["Sizes", "figure4", "table1", "tower"]

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


_SMOKE = Sizes(
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
    "smoke": _SMOKE,
    "cpu": Sizes(Training(epochs=20)),
    "paper": Sizes(Training(epochs=200, patience=20), importance_samples=1000, pictures=10_000),
}
FIGURE4: dict[str, Sizes] = {
    "smoke": Sizes(**{**vars(_SMOKE), "stages": 5, "training": Training(epochs=1)}),
    "cpu": Sizes(Training(epochs=10), stages=5),
    "paper": Sizes(
        Training(epochs=200, patience=20), stages=5, importance_samples=1000, pictures=10_000
    ),
}
_VAES = "a VAE above another models z by a normal likelihood with learnt location and scale"


def tower(dim: int, sizes: Sizes, *, seed: int) -> list[VAE]:
    """Return VAEs, untrained: one over bits, the others each over the z of the one below.

    Args:
        dim: number of bits.
        sizes: widths and number of VAEs.
        seed: of the initial weights.
    """

    def build() -> list[VAE]:
        own = {"units": sizes.units, "layers": sizes.layers}
        bottom = VAE(dim, sizes.latent, **own)
        above = range(1, sizes.stages)
        return [
            bottom,
            *(VAE(sizes.latent, sizes.latent, likelihood="gaussian", **own) for _ in above),
        ]

    return parts.seeded(seed, build)


def _judge(
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


def _rows(
    name: str, runs: list[dict[str, tuple[float, float]]], paper: float | None
) -> list[dict[str, Any]]:
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


def _value(rows: list[dict[str, Any]], name: str, metric: str) -> tuple[float, float]:
    row = next(r for r in rows if r["name"] == name and r["metric"] == metric)
    return row["value"], math.hypot(row["std_error"] or 0.0, row["seed_error"] or 0.0)


def _notes(sizes: Sizes, found: Images, *, real: float) -> list[str]:
    return [
        f"log-likelihoods are importance-sampled, {sizes.importance_samples} samples an image, "
        "and low by the logarithm's bias",
        f"distinguishable: nine of an image's ten nearest training images bear one label, which "
        f"holds for {real:.2f} of the test images; grey: probability between 0.1 and 0.9; both "
        f"over {sizes.pictures:,} draws",
    ]


def _real(found: Images) -> float:
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
            results.append(_judge(cascade[:k], found, sizes, seed=seed))
            drawn = parts.mean_images(cascade[:k], 64, seed=seed)
            pictures.setdefault(f"k = {k}", drawn)
        run.say(f"seed {seed}: {', '.join(f'{r[-1][BOUND][0]:.2f}' for r in judged)} nats")
    rows = [*_rows("k = 1", judged[0], -102.51), *_rows("k = 2", judged[1], -100.44)]
    gain = over_seeds("k = 2", "L_2, test", gains, kind="bound")
    gain_error = math.hypot(gain["std_error"], gain["seed_error"] or 0.0)
    one, two = (_value(rows, f"k = {k}", CLEAR) for k in (1, 2))
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
            f"± {two[1]:.3f} at k = 2; a stand-in for the paper's pictures, which were not measured",
        ),
    ]
    return Findings(
        data=found.words,
        settings=asdict(sizes),
        assumed=[*parts.ASSUMED, f"at most {sizes.training.epochs} epochs a stage", _VAES],
        rows=[*rows, gain],
        shown=[BOUND, LIKELIHOOD, "L_2, test", CLEAR],
        claims=claims,
        notes=_notes(sizes, found, real=_real(found)),
        draw=partial(_draw, pictures=pictures, shape=found.shape),
    )


def _draw(path: Path, *, pictures: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    sample_grids(path, pictures, shape)


_PAPER4 = {"base VAE": -102.651, "deeper VAE": -140.54, "wider VAE": -87.74, "boosted VAEs": -100.91}


def _contestants(dim: int, sizes: Sizes, seed: int) -> dict[str, Cascade]:
    vaes = tower(dim, sizes, seed=seed)
    shapes = {"deeper VAE": (sizes.units, sizes.deep_layers), "wider VAE": (sizes.wide_units, 2)}
    single = {
        name: parts.seeded(seed, partial(VAE, dim, sizes.latent, units=units, layers=layers))
        for name, (units, layers) in shapes.items()
    }
    return {
        "base VAE": Cascade(vaes[0]),
        **{name: Cascade(vae) for name, vae in single.items()},
        "boosted VAEs": Cascade(*vaes),
    }


def figure4(run: Run) -> Findings:
    """Figure 4: one VAE, a deeper one, a wider one, and five boosted VAEs of the base's size."""
    sizes, found = FIGURE4[run.scale], parts.images(run)
    judged: dict[str, list[dict[str, tuple[float, float]]]] = {name: [] for name in _PAPER4}
    seconds: dict[str, list[float]] = {name: [] for name in _PAPER4}
    pictures: dict[str, Tensor] = {}
    for seed in run.seeds:
        for name, cascade in _contestants(found.train.shape[1], sizes, seed).items():
            # The boosted model's bottom stage is the base VAE, which is trained once.
            start = 1 if name == "boosted VAEs" else 0
            done = parts.train(
                run, cascade, found, sizes.training, seed=seed, folder=name.split()[0], start=start
            )
            before = seconds["base VAE"][-1] if start else 0.0
            seconds[name].append(before + sum(stage.fit.seconds for stage in done.stages))
            judged[name].append(_judge(cascade, found, sizes, seed=seed))
            pictures.setdefault(name, parts.mean_images(cascade, 64, seed=seed))
            run.say(f"seed {seed}, {name}: {judged[name][-1][BOUND][0]:.2f} nats")
    rows = [row for name, runs in judged.items() for row in _rows(name, runs, _PAPER4[name])]
    rows += [
        over_seeds(
            name, "training time", [(s, None) for s in spent], kind="measure", unit="seconds"
        )
        for name, spent in seconds.items()
    ]
    return Findings(
        data=found.words,
        settings=asdict(sizes),
        assumed=[
            *parts.ASSUMED,
            f"at most {sizes.training.epochs} epochs for each VAE and each stage",
            "the deeper VAE has ten layers, and the wider one two of 2,500, in encoder and decoder "
            "each, as the base VAE has two of 500",
            _VAES,
        ],
        rows=rows,
        shown=[BOUND, LIKELIHOOD, CLEAR, GREY, "training time"],
        claims=_figure4_claims(rows),
        notes=_notes(sizes, found, real=_real(found)),
        draw=partial(_draw, pictures=pictures, shape=found.shape),
    )


def _figure4_claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    bound = {name: _value(rows, name, BOUND) for name in _PAPER4}
    clear = {name: _value(rows, name, CLEAR)[0] for name in _PAPER4}
    grey = {name: _value(rows, name, GREY)[0] for name in _PAPER4}
    told = ", ".join(f"{name} {value:.2f} ± {error:.2f}" for name, (value, error) in bound.items())
    looks = ", ".join(f"{n} {clear[n]:.2f} ({100 * grey[n]:.1f} % grey)" for n in _PAPER4)
    values = {name: value for name, (value, _) in bound.items()}
    both = [n for n in _PAPER4 if clear[n] >= 0.5 and grey[n] <= grey["base VAE"]]
    return [
        claim("the wider VAE has the highest bound", max(values, key=values.get) == "wider VAE", told),  # type: ignore[arg-type]
        claim("the deeper VAE has the lowest bound", min(values, key=values.get) == "deeper VAE", told),  # type: ignore[arg-type]
        claim("boosting raises the base VAE's bound", values["boosted VAEs"] > values["base VAE"], told),
        claim(
            "the wider VAE's digits are usually undistinguishable",
            clear["wider VAE"] < 0.5,
            f"distinguishable samples: {looks}",
        ),
        claim(
            "the deeper VAE's digits can be distinguished but are blurred",
            clear["deeper VAE"] >= 0.5 and grey["deeper VAE"] > grey["base VAE"],
            f"distinguishable samples: {looks}",
        ),
        claim(
            "only the boosted VAEs' digits are both distinguishable and sharp",
            set(both) - {"base VAE"} == {"boosted VAEs"},
            f"distinguishable samples: {looks}; sharp: no greyer than the base VAE's",
        ),
    ]
