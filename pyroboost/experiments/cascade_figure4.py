"""Cascaded meta-models, Figure 4: a boosted VAE against deeper and wider ones."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import Tensor

from pyroboost.compose import Cascade
from pyroboost.experiments import parts
from pyroboost.experiments.cascade import (
    BOUND,
    CLEAR,
    GREY,
    LIKELIHOOD,
    SMOKE,
    VAES,
    Sizes,
    draw,
    judge,
    notes,
    pooled,
    real_share,
    rows_of,
    tower,
)
from pyroboost.experiments.parts import Training
from pyroboost.experiments.record import claim, over_seeds
from pyroboost.experiments.runner import Findings, Run
from pyroboost.models import VAE

__all__ = ["figure4"]

FIGURE4: dict[str, Sizes] = {
    "smoke": replace(SMOKE, stages=5, training=Training(epochs=1)),
    "cpu": Sizes(Training(epochs=10), stages=5, importance_samples=20),
    "paper": Sizes(
        Training(epochs=200, patience=20), stages=5, importance_samples=1000, pictures=10_000
    ),
}

_PAPER4 = {
    "base VAE": -102.651,
    "deeper VAE": -140.54,
    "wider VAE": -87.74,
    "boosted VAEs": -100.91,
}


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
            judged[name].append(judge(cascade, found, sizes, seed=seed))
            pictures.setdefault(name, parts.mean_images(cascade, 64, seed=seed))
            run.say(f"seed {seed}, {name}: {judged[name][-1][BOUND][0]:.2f} nats")
    rows = [row for name, runs in judged.items() for row in rows_of(name, runs, _PAPER4[name])]
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
            VAES,
        ],
        rows=rows,
        shown=[BOUND, LIKELIHOOD, CLEAR, GREY, "training time"],
        claims=_figure4_claims(rows),
        notes=notes(sizes, found, real=real_share(found)),
        draw=partial(draw, pictures=pictures, shape=found.shape),
    )


def _figure4_claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    bound = {name: pooled(rows, name, BOUND) for name in _PAPER4}
    clear = {name: pooled(rows, name, CLEAR)[0] for name in _PAPER4}
    grey = {name: pooled(rows, name, GREY)[0] for name in _PAPER4}
    told = ", ".join(f"{name} {value:.2f} ± {error:.2f}" for name, (value, error) in bound.items())
    looks = ", ".join(f"{n} {clear[n]:.2f} ({100 * grey[n]:.1f} % grey)" for n in _PAPER4)
    values = {name: value for name, (value, _) in bound.items()}
    order = sorted(_PAPER4, key=lambda name: values[name])
    both = [n for n in _PAPER4 if clear[n] >= 0.5 and grey[n] <= grey["base VAE"]]
    return [
        claim("the wider VAE has the highest bound", order[-1] == "wider VAE", told),
        claim("the deeper VAE has the lowest bound", order[0] == "deeper VAE", told),
        claim(
            "boosting raises the base VAE's bound",
            values["boosted VAEs"] > values["base VAE"],
            told,
        ),
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
