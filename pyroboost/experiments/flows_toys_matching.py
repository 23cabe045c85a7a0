"""Gradient boosted flows, Figure 5: densities in the plane, from energies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from pyroboost.data.energies import ENERGIES, WALL, energy_log_density
from pyroboost.data.grids import plane_grid
from pyroboost.experiments.flows_toys import (
    INTEGRAL,
    SMOKE,
    Sizes,
    Trained,
    kept,
    margin,
    num_parameters,
    one_each,
    picture,
    realnvps,
)
from pyroboost.experiments.flows_toys_figures import Panel, density_table
from pyroboost.experiments.record import claim, over_seeds
from pyroboost.experiments.runner import Findings, Run
from pyroboost.models.flow_mixture import FlowMixture

__all__ = ["figure5"]

DEEP, SHALLOW = "RealNVP, K = 16", "GBF, C = 2, K = 4"
_ALIKE = 0.05  # nats of KL(q, p)
FIGURE5: dict[str, Sizes] = {
    "smoke": Sizes(("u2",), 16, **SMOKE),
    "cpu": Sizes(tuple(ENERGIES), 2400, batch_size=128),
    "paper": Sizes(tuple(ENERGIES), 50_000, 128, lr=1e-3),
}


def figure5(run: Run) -> Findings:
    """Figure 5: two short flows against a RealNVP of twice the parameters, on four energies."""
    sizes = FIGURE5[run.scale]
    grid = plane_grid(6.0, sizes.grid)
    rows: list[dict[str, Any]] = []
    pictures: dict[str, list[Panel]] = {}
    for name in sizes.toys:
        log_p = grid.evaluate(energy_log_density(name))
        log_z = grid.log_integral(log_p)
        runs: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
        panels = [("target", (_target(name, sizes.picture) - log_z).exp())]
        for seed in run.seeds:
            for label, done in _matched(run, name, sizes, seed).items():
                log_q = grid.evaluate(done.model.components.log_density)
                own = runs.setdefault(label, {})
                for metric, value in (
                    ("KL(q, p)", grid.divergence(log_q, log_p - log_z)),
                    ("KL(p, q)", grid.divergence(log_p - log_z, log_q)),
                    (INTEGRAL, math.exp(grid.log_integral(log_q))),
                ):
                    own.setdefault(metric, []).append((value, None))
                error = (done.found[0] - log_z, done.found[1])
                own.setdefault("log Z, error", []).append(error)
                if seed == run.seeds[0]:
                    panels.append((label, picture(done.model, sizes.picture)))
                run.say(f"{name}, seed {seed}, {label}: KL(q, p) {own['KL(q, p)'][-1][0]:.4f}")
        pictures[name] = panels
        for label, metrics in runs.items():
            for metric, values in metrics.items():
                kind = "estimate" if metric.startswith("log Z") else "measure"
                unit = "share" if metric == INTEGRAL else "nats"
                rows.append(over_seeds(f"{name}, {label}", metric, values, kind=kind, unit=unit))
    counts = {DEEP: num_parameters(realnvps(1, 16, sizes, 0)),
              SHALLOW: num_parameters(realnvps(2, 4, sizes, 0))}  # fmt: skip
    return Findings(
        data="the energies U1 to U4 of Rezende and Mohamed (2015), Table 1",
        settings={**asdict(sizes), "parameters": counts},
        assumed=[
            f"a wall at {WALL[0]:g} in each coordinate, behind which the density falls as half a "
            f"normal of standard deviation {WALL[1]:g}, since U2 to U4 have no finite integral",
            f"{sizes.steps:,} gradient steps each; of the boosted flow's half are rounds and half "
            "one fine-tuning pass",
            f"Adam at {sizes.lr:g}, {sizes.batch_size} draws a step, no annealing of the energy",
            "objectives: Eq. 11 with entropy weight 1 in rounds, the mixture's own bound in passes",
        ],
        rows=rows,
        shown=["KL(q, p)", "KL(p, q)", "log Z, error", INTEGRAL],
        claims=[*_matches(rows, sizes.toys), one_each(rows)],
        notes=[
            "KL(q, p) is the divergence of the model q from the target p, KL(p, q) that of the "
            "target from the model, which sees a mode that the model misses; both by quadrature "
            f"over [-6, 6]^2 in {sizes.grid}^2 cells",
            "log Z, error: the estimate by importance sampling less the quadrature; integral: of "
            "the model over the same square",
        ],
        draw=partial(density_table, rows=pictures, bound=4.5),
    )


def _target(name: str, steps: int) -> Tensor:
    found = plane_grid(4.5, steps).evaluate(energy_log_density(name))
    return found.reshape(steps, steps)


def _matched(run: Run, name: str, sizes: Sizes, seed: int) -> dict[str, Trained]:
    quarter = max(1, sizes.steps // 4)
    plans: Mapping[str, tuple[int, int, dict[str, int]]] = {
        DEEP: (1, 16, {"steps": sizes.steps, "finetune": 0}),
        SHALLOW: (2, 4, {"steps": quarter, "finetune": 1, "finetune_length": quarter}),
    }
    found = {}
    for label, (count, length, plan) in plans.items():
        model = realnvps(count, length, sizes, seed)

        def train(model: FlowMixture = model, plan: dict[str, int] = plan) -> Trained:
            report = model.match(
                energy_log_density(name),
                batch_size=sizes.batch_size,
                lr=sizes.lr,
                seed=seed,
                num_samples=sizes.test,
                **plan,
            )
            return Trained(model, sizes.steps, (report.log_partition, report.std_error))

        found[label] = kept(run, (name, f"{seed}", f"{count}x{length}"), model, train)
    return found


def _matches(rows: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Check section 5.1.2: as well or better with half the parameters."""
    claims = []
    for name in names:
        own = [
            {**row, "metric": label, "name": name}
            for row in rows
            for label in (DEEP, SHALLOW)
            if row["metric"] == "KL(q, p)" and row["name"] == f"{name}, {label}"
        ]
        gain, half = margin(own, name, SHALLOW, DEEP)
        claims.append(
            claim(
                f"{name}: two flows of K = 4 match as well as one of K = 16, or better",
                gain - half > -_ALIKE,
                f"KL(q, p) is {gain:.4f} nats less, ± {half:.4f}, Student's 95 % interval over "
                f"seeds; as well is within {_ALIKE:g} nats",
            )
        )
    return claims
