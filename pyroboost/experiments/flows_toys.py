"""Gradient boosted flows, Figure 4: densities in the plane, from samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyroboost import flows
from pyroboost.contexts import forked_rng
from pyroboost.data.grids import Grid, plane_grid
from pyroboost.data.toys import TOYS, toy
from pyroboost.experiments.flows_toys_figures import Panel, density_table
from pyroboost.experiments.record import claim, over_seeds
from pyroboost.experiments.runner import Findings, Run
from pyroboost.models.flow_mixture import FlowMixture

__all__ = [
    "INTEGRAL",
    "SMOKE",
    "Sizes",
    "Trained",
    "figure4",
    "integral",
    "kept",
    "margin",
    "num_parameters",
    "one_each",
    "picture",
    "realnvps",
]

MATCHES = ((8, 1), (4, 2), (2, 4))
SINGLE = "RealNVP, K = 8"
INTEGRAL = "integral"
_WIDE = 8.0  # half the side of the square that is integrated over


@dataclass(frozen=True)
class Sizes:
    """Sizes and lengths.

    Args:
        toys: data sets or energies.
        steps: gradient steps of each model.
        units: width of the coupling networks' hidden layer.
        batch_size: data or draws in a step.
        lr: learning rate of Adam, with a cosine over each fit where there are data.
        train: training points.
        validation: points for choices.
        test: points for the numbers.
        grid: cells along a side of the grids of integrals.
        picture: cells along a side of pictures.
    """

    toys: tuple[str, ...]
    steps: int
    units: int = 64
    batch_size: int = 256
    lr: float = 5e-3
    train: int = 5000
    validation: int = 2000
    test: int = 10_000
    grid: int = 500
    picture: int = 100


_SETS = ("eight_gaussians", "rings", "moons", "pinwheel", "two_spirals", "checkerboard")
SMOKE = {"units": 8, "train": 300, "validation": 100, "test": 200, "grid": 40, "picture": 20}
FIGURE4: dict[str, Sizes] = {
    "smoke": Sizes(("moons",), 16, **SMOKE),
    "cpu": Sizes(_SETS, 1400),
    "paper": Sizes((*_SETS, "swiss_roll", "circles"), 25_000, 128, train=50_000),
}


def name_of(count: int, steps: int) -> str:
    """Return how tables call a boosted flow.

    Example:
        >>> name_of(8, 1)
        'GBF, C = 8, K = 1'
    """
    return f"GBF, C = {count}, K = {steps}"


class Trained(NamedTuple):
    """A trained model, its gradient steps and what its fit estimated."""

    model: FlowMixture
    steps: int
    found: tuple[float, ...] = ()


def realnvps(count: int, steps: int, sizes: Sizes, seed: int) -> FlowMixture:
    """Return a mixture of so many RealNVPs of so many steps, as it starts under a seed."""
    with forked_rng(seed):
        return FlowMixture(2, count, partial(flows.realnvp, steps=steps, units=sizes.units))


def num_parameters(model: FlowMixture) -> int:
    """Return the number of parameters that training moves."""
    return sum(p.numel() for p in model.parameters())


def kept(
    run: Run, parts: tuple[str, ...], model: FlowMixture, train: Callable[[], Trained]
) -> Trained:
    """Train a model, or take what an interrupted run has left of it."""
    path = run.checkpoints(*parts[:-1]) / f"{parts[-1]}.pt"
    if path.exists():
        held = torch.load(path, weights_only=True)
        model.load_state_dict(held["state"])
        return Trained(model, held["steps"], tuple(held["found"]))
    done = train()
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"state": model.state_dict(), "steps": done.steps, "found": list(done.found)}
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    part.replace(path)
    return done


def figure4(run: Run) -> Findings:
    """Figure 4: boosted flows against one RealNVP of as many parameters, on samples."""
    sizes = FIGURE4[run.scale]
    grid = plane_grid(_WIDE, sizes.grid)
    rows: list[dict[str, Any]] = []
    pictures: dict[str, list[Panel]] = {}
    steps: dict[str, int] = {}
    for name in sizes.toys:
        scores: dict[str, list[tuple[float, float]]] = {}
        masses: dict[str, list[tuple[float, float | None]]] = {}
        for seed in run.seeds:
            data = toy(name, train=sizes.train, validation=sizes.validation, test=sizes.test,
                       seed=seed)  # fmt: skip
            models = _estimated(run, name, data, sizes, seed)
            truth, test = TOYS[name].log_prob, data.test
            assert isinstance(test, Tensor)
            scores.setdefault("truth", []).append(_nll(truth(test)))
            panels: list[Panel] = [("data", data.train_tensor()[:2000])]
            for label, done in models.items():
                value = done.model.log_marginal(test).value.detach()
                scores.setdefault(label, []).append(_nll(value))
                masses.setdefault(label, []).append((integral(done.model, grid), None))
                panels.append((label, picture(done.model, sizes.picture)))
                steps[label] = max(done.steps, steps.get(label, 0))
            pictures.setdefault(name, panels)
            said = ", ".join(f"{label} {runs[-1][0]:.3f}" for label, runs in scores.items())
            run.say(f"{name}, seed {seed}, NLL: {said}")
        rows += [over_seeds(name, label, runs, kind="exact") for label, runs in scores.items()]
        rows += [
            over_seeds(f"{name}, {INTEGRAL}", label, runs, kind="measure", unit="share")
            for label, runs in masses.items()
        ]
    counts = {
        name_of(c, k): num_parameters(realnvps(c, k, sizes, 0)) for c, k in ((1, 8), *MATCHES)
    }
    return Findings(
        data=f"{sizes.train:,} training, {sizes.validation:,} validation and {sizes.test:,} test "
        "points of densities that are known, drawn anew for each seed",
        settings={**asdict(sizes), "parameters": counts, "most gradient steps": steps},
        assumed=[
            "one flow is two affine couplings with one hidden layer each; half of the steps go to "
            "rounds, half to joint training",
            f"Adam at {sizes.lr:g} with a cosine over each fit, batches of {sizes.batch_size}",
            "the RealNVP has the gradient steps of the boosted flow that made the most, and the "
            "best weights on validation data, as these have",
            "a new component starts near a point that the others miss and is trained by the "
            "mixture's own likelihood; the paper's residual objective is objective='residual'",
        ],
        rows=rows,
        shown=["truth", SINGLE, *(name_of(*m) for m in MATCHES)],
        claims=[*_better(rows, sizes.toys), one_each(rows)],
        notes=[
            "numbers are negative log-likelihoods per test point, so that less is better and the "
            "truth is the least that is possible",
            f"integral: of the trained density over [-{_WIDE:g}, {_WIDE:g}]^2, by the midpoint "
            f"rule in {sizes.grid}^2 cells",
            "gradient steps are matched, not time: a step of one small component is cheaper than "
            "one of the RealNVP, a joint step of all components dearer",
            "the recipe of boosting was chosen on eight_gaussians and two_spirals, drawn with "
            "another seed than those here",
        ],
        draw=partial(density_table, rows=pictures, bound=4.5),
    )


def _estimated(run: Run, name: str, data: Any, sizes: Sizes, seed: int) -> dict[str, Trained]:
    """Train the boosted flows, then one RealNVP with as many steps as any of them."""
    fit = {"validation": data.validation, "batch_size": sizes.batch_size, "lr": sizes.lr,
           "passes": 0, "seed": seed}  # fmt: skip
    found: dict[str, Trained] = {}

    def trained(model: FlowMixture, **settings: Any) -> Trained:
        return Trained(model, model.fit(data.train, **fit, **settings).num_steps)

    for count, length in MATCHES:
        model = realnvps(count, length, sizes, seed)
        each = max(1, sizes.steps // (2 * count))
        train = partial(trained, model, steps=each, joint_steps=sizes.steps // 2)
        key = (name, f"{seed}", f"{count}x{length}")
        found[name_of(count, length)] = kept(run, key, model, train)
    most = max(done.steps for done in found.values())
    model = realnvps(1, 8, sizes, seed)
    train = partial(trained, model, steps=most)
    return {SINGLE: kept(run, (name, f"{seed}", "1x8"), model, train), **found}


def _nll(values: Tensor) -> tuple[float, float]:
    values = values.double()
    return -float(values.mean()), float(values.std()) / math.sqrt(len(values))


def integral(model: FlowMixture, grid: Grid) -> float:
    """Return the mass of a trained density over a square."""
    return math.exp(grid.log_integral(grid.evaluate(model.components.log_density)))


def one_each(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Check that every trained density has its mass on the grid."""
    found = [
        (value, row["name"], row["metric"])
        for row in rows
        if INTEGRAL in (row["metric"], row["name"].rpartition(", ")[2])
        for value in row.get("by_seed", [row["value"]])
    ]
    worst = max(found, key=lambda one: abs(one[0] - 1))
    return claim(
        "every trained density integrates to 1, within 0.01",
        abs(worst[0] - 1) < 0.01,
        f"furthest from 1: {worst[0]:.4f} ({worst[1]}, {worst[2]})",
    )


def picture(model: FlowMixture, steps: int) -> Tensor:
    """Return the density on a grid, (steps, steps)."""
    grid = plane_grid(4.5, steps)
    return grid.evaluate(model.components.log_density).exp().reshape(steps, steps)


def margin(rows: list[dict[str, Any]], name: str, first: str, other: str) -> tuple[float, float]:
    """Return how much less one number is than another, and half its 95 % interval over seeds.

    The interval is Student's, since seeds are few; for one seed it is that of its own errors.
    """
    from scipy.stats import t

    found = {row["metric"]: row for row in rows if row["name"] == name}
    one, two = found[first], found[other]
    pairs = zip(two.get("by_seed", [two["value"]]), one.get("by_seed", [one["value"]]), strict=True)
    gaps = torch.tensor([b - a for b, a in pairs], dtype=torch.float64)
    if len(gaps) > 1:
        wide = float(t.ppf(0.975, len(gaps) - 1))
        return float(gaps.mean()), wide * float(gaps.std()) / math.sqrt(len(gaps))
    return float(gaps), 1.96 * math.hypot(one["std_error"] or 0.0, two["std_error"] or 0.0)


def _better(rows: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Check section 5.1.1: the boosted flow is better than a RealNVP of the same size."""
    claims = []
    for match in MATCHES:
        label = name_of(*match)
        gains = {name: margin(rows, name, label, SINGLE) for name in names}
        claims.append(
            claim(
                f"{label} models every density better than a RealNVP of as many parameters",
                all(gain > half for gain, half in gains.values()),
                ", ".join(f"{n}: {g:.3f} nats less, ± {h:.3f}" for n, (g, h) in gains.items())
                + "; ± are Student's 95 % intervals over seeds",
            )
        )
    return claims
