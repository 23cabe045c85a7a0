"""Gradient boosted flows, Figure 1: one affine flow covers two modes, two of them part."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyroboost import flows
from pyroboost.contexts import forked_rng, stream_seed
from pyroboost.data.grids import Grid, plane_grid
from pyroboost.experiments.flows_toys import INTEGRAL, one_each
from pyroboost.experiments.flows_toys_figures import Panel, density_table
from pyroboost.experiments.record import claim, over_seeds
from pyroboost.experiments.runner import Findings, Run
from pyroboost.models.flow_mixture import FlowMixture

__all__ = ["figure1"]

STAGES = ("one component", "two components", "fine-tuned")
LEFT, RIGHT = 0.4, 0.6
CENTRES, SCALES = ((-2.0, 0.0), (2.0, 0.0)), ((0.5, 1.0), (0.5, 1.0))


@dataclass(frozen=True)
class Sizes:
    """Sizes and lengths.

    Args:
        steps: gradient steps of each fit.
        passes: passes of fine-tuning.
        lr: learning rate of Adam, with a cosine over each fit.
        train: training points.
        validation: points for choices.
        test: points for the numbers.
        grid: cells along a side of the grid of integrals and pictures.
    """

    steps: int
    passes: int = 2
    lr: float = 0.02
    train: int = 5000
    validation: int = 2000
    test: int = 10_000
    grid: int = 300


SIZES: dict[str, Sizes] = {
    "smoke": Sizes(10, 1, train=300, validation=100, test=200, grid=40),
    "cpu": Sizes(500),
    "paper": Sizes(25_000, lr=1e-3, train=50_000),
}


def target(x: Tensor) -> Tensor:
    """Return the log density of two ellipsoids of weights 0.4 and 0.6, in nats."""
    scales, centres = torch.tensor(SCALES), torch.tensor(CENTRES)
    squares = ((x[..., None, :] - centres) / scales).square().sum(-1)
    logs = torch.tensor([LEFT, RIGHT]).log() - scales.log().sum(-1) - math.log(2 * math.pi)
    return (logs - squares / 2).logsumexp(-1)


def _draws(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(stream_seed(seed))
    chosen = (torch.rand(count, generator=generator) < RIGHT).long()
    noise = torch.randn(count, 2, generator=generator)
    return torch.tensor(CENTRES)[chosen] + torch.tensor(SCALES)[chosen] * noise


def figure1(run: Run) -> Findings:
    """Figure 1: one affine flow, a second by boosting, and fine-tuning, on two ellipsoids."""
    sizes = SIZES[run.scale]
    grid = plane_grid(6.0, sizes.grid)
    found: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
    panels: list[Panel] = []
    for seed in run.seeds:
        x = _draws(sizes.train + sizes.validation + sizes.test, seed)
        train, validation, test = torch.split(x, [sizes.train, sizes.validation, sizes.test])
        for stage, model in zip(STAGES, _stages(train, validation, sizes, seed), strict=True):
            for metric, value in _measures(model, test, grid).items():
                found.setdefault((stage, metric), []).append(value)
            if seed == run.seeds[0]:
                density = grid.evaluate(model.components.log_density).exp()
                panels.append((stage, density.reshape(sizes.grid, sizes.grid)))
            run.say(f"seed {seed}, {stage}: NLL {found[stage, 'NLL, test'][-1][0]:.4f}")
    density = grid.evaluate(target).exp().reshape(sizes.grid, sizes.grid)
    panels.insert(0, ("target", density))
    rows = [
        over_seeds(stage, metric, runs, kind=_kind(metric), unit=_unit(metric))
        for (stage, metric), runs in found.items()
    ]
    return Findings(
        data=f"two ellipsoids of weights {LEFT} and {RIGHT}, {sizes.train:,} training points, "
        "drawn anew for each seed",
        settings=asdict(sizes),
        assumed=[
            "the paper gives no numbers for its target: two normals, 8 standard deviations apart",
            "components are one scale and shift of each coordinate, trained by likelihood; "
            f"{sizes.steps:,} steps each, then {sizes.passes} passes of half as many; Adam "
            f"at {sizes.lr:g}",
        ],
        rows=rows,
        shown=[
            "NLL, test",
            "KL(p, q)",
            "weight of the left",
            "first centre from the middle",
            INTEGRAL,
        ],
        claims=[*_claims(rows), one_each(rows)],
        notes=[
            "the weight of the left is that of the component whose mean lies further left",
            f"integral: of the model over [-6, 6]^2 in {sizes.grid}^2 cells",
        ],
        draw=partial(density_table, rows={"": panels}, bound=6.0, size=2.2),
    )


def _stages(train: Tensor, validation: Tensor, sizes: Sizes, seed: int) -> list[FlowMixture]:
    """Return the mixture as it stands after each stage."""
    found: list[FlowMixture] = []
    for stage in STAGES:
        with forked_rng(seed):
            model = FlowMixture(2, 1 if stage == STAGES[0] else 2, flows.affine)
        if found:
            _take_over(model, found[-1])
        model.fit(
            train,
            validation=validation,
            start="current" if found else "fresh",
            steps=sizes.steps,
            lr=sizes.lr,
            passes=sizes.passes if stage == STAGES[-1] else 0,
            seed=seed,
        )
        found.append(model)
    return found


def _take_over(model: FlowMixture, before: FlowMixture) -> None:
    """Give a mixture the components of a smaller one, or of one of its size."""
    state = dict(before.state_dict())
    own, count = model.state_dict(), len(before.weights)
    for name in state:
        if state[name] is not None and name.endswith("flows.weights"):
            state[name] = torch.nn.functional.pad(state[name], (0, len(model.weights) - count))
    model.load_state_dict({**own, **state})


def _measures(
    model: FlowMixture, test: Tensor, grid: Grid
) -> dict[str, tuple[float, float | None]]:
    values = model.log_marginal(test).value.detach().double()
    log_q, log_p = grid.evaluate(model.components.log_density), grid.evaluate(target)
    parts, weights = model.components, model.weights
    with torch.no_grad():  # an affine flow maps the base's mean to its own
        centres = [float(parts.loc[0] + parts.scale[0] * f(torch.zeros(1, 2))[0][0, 0])
                   for f in parts.flows.flows]  # fmt: skip
    left = min(range(len(centres)), key=centres.__getitem__)
    return {
        "NLL, test": (-float(values.mean()), float(values.std()) / math.sqrt(len(values))),
        "KL(p, q)": (grid.divergence(log_p, log_q), None),
        "weight of the left": (float(weights[left]), None),
        "first centre from the middle": (abs(centres[0]), None),
        INTEGRAL: (math.exp(grid.log_integral(log_q)), None),
    }


def _kind(metric: str) -> str:
    return "exact" if metric == "NLL, test" else "measure"


def _unit(metric: str) -> str:
    return "nats" if metric.startswith(("NLL", "KL")) else "share"


def _claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = {(row["name"], row["metric"]): row["value"] for row in rows}
    kl = [found[stage, "KL(p, q)"] for stage in STAGES]
    weights = [found[stage, "weight of the left"] for stage in STAGES]
    first = [found[stage, "first centre from the middle"] for stage in STAGES]
    told = ", ".join(f"{k:.4f}" for k in kl)
    return [
        claim(
            "a second component improves what one affine flow, which covers both modes, can do",
            kl[1] < kl[0],
            f"KL(p, q) goes {told}",
        ),
        claim("fine-tuning improves it further", kl[2] < kl[1], f"KL(p, q) goes {told}"),
        claim(
            "fine-tuning moves the first component from the middle to one of the ellipsoids",
            first[0] < 1.0 and abs(first[2] - 2.0) < 0.2,
            f"its centre is at {first[0]:.2f}, {first[1]:.2f}, {first[2]:.2f} to either side",
        ),
        claim(
            "the weights end right to 0.02",
            abs(weights[2] - LEFT) < 0.02,
            f"the left has {weights[2]:.3f}; its ellipsoid has {LEFT}",
        ),
    ]
