"""Cascaded meta-models, Figure 2: the bound of RBMs and VAEs in four orders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor

from pyroboost.compose import Cascade
from pyroboost.contexts import forked_rng
from pyroboost.evaluation.bounds import Decomposition
from pyroboost.experiments import parts
from pyroboost.experiments.figures import bound_charts
from pyroboost.experiments.parts import Images, Training
from pyroboost.experiments.record import claim, over_seeds
from pyroboost.experiments.runner import Findings, Run
from pyroboost.metamodel import MetaModel
from pyroboost.models import RBM, VAE

__all__ = ["CHARTS", "Sizes", "figure2", "verdicts"]

CHARTS = {"(1)": "VVVVVV", "(2)": "RRVVVV", "(3)": "RRRRVV", "(4)": "RRRRRR"}
PARTS = ("test", "train")


@dataclass(frozen=True)
class Sizes:
    """Sizes and lengths.

    Args:
        vae: how each VAE is trained.
        rbm: how each RBM is trained.
        units: width of the VAEs' deterministic layers.
        latent: their latent dimensions.
        hidden: hidden units of the bottom RBM.
        sweeps: Gibbs sweeps of the persistent chains in a step.
        chains: chains of annealed importance sampling.
        temperatures: its temperatures.
        train_images: training images on which the bound is measured.
        bound_samples: draws per image.
    """

    vae: Training
    rbm: Training
    units: int = 500
    latent: int = 20
    hidden: int = 500
    sweeps: int = 1
    chains: int = 500
    temperatures: int = 2000
    train_images: int = 10_000
    bound_samples: int = 2


SIZES: dict[str, Sizes] = {
    "smoke": Sizes(
        Training(epochs=1),
        Training(epochs=1),
        units=16,
        latent=3,
        hidden=12,
        train_images=200,
        bound_samples=1,
    ),
    "cpu": Sizes(Training(epochs=12), Training(epochs=12)),
    "paper": Sizes(
        Training(epochs=200, patience=20),
        Training(epochs=200),
        sweeps=5,
        chains=5000,
        temperatures=10_000,
    ),
}


class _Builder:
    """Trains each prefix of the combinations once."""

    def __init__(self, run: Run, found: Images, sizes: Sizes, seed: int) -> None:
        self.run, self.found, self.sizes, self.seed = run, found, sizes, seed
        self.stages: dict[str, MetaModel] = {}

    def cascade(self, kinds: str) -> Cascade:
        """Return the trained cascade of these kinds, R an RBM and V a VAE."""
        for k in range(1, len(kinds) + 1):
            if kinds[:k] not in self.stages:
                self._grow(kinds[:k])
        return Cascade(*(self.stages[kinds[:k]] for k in range(1, len(kinds) + 1)))

    def _grow(self, kinds: str) -> None:
        below = kinds[:-1]
        new = parts.seeded(1000 * self.seed + len(kinds), partial(self._stage, below, kinds[-1]))
        cascade = Cascade(*self.cascade(below), new) if below else Cascade(new)
        is_rbm = isinstance(new, RBM)
        # Held-out bounds of an RBM need log Z after every epoch; its last weights are kept instead.
        parts.train(
            self.run,
            cascade,
            self.found,
            self.sizes.rbm if is_rbm else self.sizes.vae,
            seed=self.seed,
            folder=kinds,
            start=len(below),
            held_out=not is_rbm,
        )
        if isinstance(new, RBM):
            with forked_rng(self.seed):
                new.refresh(num_chains=self.sizes.chains, num_temperatures=self.sizes.temperatures)
        self.stages[kinds] = new

    def _stage(self, below: str, kind: str) -> MetaModel:
        sizes, under = self.sizes, self.stages.get(below)
        if kind == "V":
            bits = not isinstance(under, VAE)
            dim = self.found.train.shape[1] if under is None else _size(under)
            likelihood = "bernoulli" if bits else "gaussian"
            return VAE(dim, sizes.latent, units=sizes.units, likelihood=likelihood)  # type: ignore[arg-type]
        if isinstance(under, RBM):
            return RBM.transposed(under, sweeps=sizes.sweeps)
        data = self.found.train
        bottom = RBM(data.shape[1], sizes.hidden, sweeps=sizes.sweeps)
        bottom.init_visible_bias(data)
        return bottom


def _size(stage: MetaModel) -> int:
    assert stage.hidden_shape is not None
    return math.prod(stage.hidden_shape)


def figure2(run: Run) -> Findings:
    """Figure 2: the bound for k = 1, ..., 6 on training and test data, in four combinations."""
    sizes, found = SIZES[run.scale], parts.images(run)
    step = max(1, len(found.train) // sizes.train_images)
    data = {"test": found.test, "train": found.train[::step][: sizes.train_images]}
    measured: dict[str, list[dict[str, Decomposition]]] = {chart: [] for chart in CHARTS}
    for seed in run.seeds:
        builder = _Builder(run, found, sizes, seed)
        for chart, kinds in CHARTS.items():
            measured[chart].append(_measure(builder.cascade(kinds), data, sizes, seed))
            sums = measured[chart][-1]["test"].partial_sums()
            run.say(f"seed {seed}, {chart} {kinds}: {', '.join(f'{v:.2f}' for v, _ in sums)} nats")
    rows = [row for chart, runs in measured.items() for row in _rows(chart, runs)]
    curves = {part: {chart: _curve(rows, chart, part) for chart in CHARTS} for part in PARTS}
    terms = {chart: _curve(rows, chart, "test", term=True) for chart in CHARTS}
    return Findings(
        data=found.words,
        settings=asdict(sizes),
        assumed=[
            *parts.ASSUMED,
            f"at most {sizes.vae.epochs} epochs a VAE, {sizes.rbm.epochs} epochs an RBM",
            f"RBM sizes: {found.train.shape[1]} x {sizes.hidden} at the bottom; each RBM above "
            "starts from the exchange of the one below, so that the sizes alternate and its term "
            "is 0 before training",
            f"RBMs: persistent contrastive divergence, 100 chains, {sizes.sweeps} sweeps a step; "
            "no early stopping",
            "a VAE above an RBM has a Bernoulli likelihood, above a VAE a normal one",
        ],
        rows=rows,
        shown=[f"k = {k}, test" for k in range(1, 7)],
        claims=verdicts(terms),
        notes=[
            "bounds whose top stage is an RBM are estimates: its log Z is "
            + ("exact here" if sizes.hidden <= 20 else _ais(sizes))
            + ", and the standard errors contain it",
            f"training bounds are measured on {len(data['train']):,} training images",
            "the paper gives Figure 2 as curves without numbers",
        ],
        draw=partial(
            bound_charts,
            charts={
                f"{chart} {kinds}": (kinds, {part: curves[part][chart] for part in PARTS})
                for chart, kinds in CHARTS.items()
            },
        ),
    )


def _ais(sizes: Sizes) -> str:
    return (
        f"estimated by annealed importance sampling ({sizes.chains:,} chains, "
        f"{sizes.temperatures:,} temperatures), which tends to flatter the model"
    )


def _measure(
    cascade: Cascade, data: Mapping[str, Tensor], sizes: Sizes, seed: int
) -> dict[str, Decomposition]:
    samples = sizes.bound_samples
    return {
        part: parts.bounds(cascade, x, seed=seed, num_samples=samples) for part, x in data.items()
    }


def _rows(chart: str, runs: list[dict[str, Decomposition]]) -> list[dict[str, Any]]:
    rows, name = [], f"{chart} {CHARTS[chart]}"
    for part, k in itertools.product(PARTS, range(1, 7)):
        kind = "estimate" if runs[0][part].terms[k - 1].kind == "estimate" else "bound"
        sums = [run[part].partial_sums()[k - 1] for run in runs]
        terms = [(run[part].terms[k - 1].value, run[part].terms[k - 1].std_error) for run in runs]
        top_rbm = CHARTS[chart][k - 1] == "R"
        total = kind if top_rbm else "bound"  # below the top, log Z cancels in the sum
        rows.append(over_seeds(name, f"k = {k}, {part}", sums, kind=total))
        rows.append(over_seeds(name, f"L_{k}, {part}", terms, kind=kind))
    return rows


def _curve(
    rows: list[dict[str, Any]], chart: str, part: str, *, term: bool = False
) -> list[tuple[float, float]]:
    found = {row["metric"]: row for row in rows if row["name"] == f"{chart} {CHARTS[chart]}"}
    names = [f"L_{k}, {part}" if term else f"k = {k}, {part}" for k in range(1, 7)]
    return [
        (found[n]["value"], math.hypot(found[n]["std_error"], found[n]["seed_error"] or 0.0))
        for n in names
    ]


def _sum(terms: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(value for value, _ in terms), math.hypot(*(error for _, error in terms))


def _told(terms: list[tuple[float, float]], first: int) -> str:
    shown = enumerate(terms, first)
    return ", ".join(f"L_{k} = {value:.2f} ± {error:.2f}" for k, (value, error) in shown)


def verdicts(terms: Mapping[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Check what section 4.2 says of Figure 2 against the terms of the bound on test data.

    A term *grows* above two standard errors; stages add *nothing much* if their terms together
    are within two standard errors or below a quarter of the gain before them.

    Args:
        terms: for each chart L_1, ..., L_6 with their standard errors, in nats.

    Returns:
        The claims.
    """

    def grows(term: tuple[float, float]) -> bool:
        return term[0] > 2 * term[1]

    def stable(later: list[tuple[float, float]], gain: float) -> bool:
        value, error = _sum(later)
        return abs(value) <= max(2 * error, 0.25 * max(gain, 0.0))

    claims = []
    for chart, kind in (("(1)", "VAEs"), ("(4)", "RBMs")):
        own = terms[chart]
        claims.append(
            claim(
                f"chart {chart}, {kind} alone: the bound first rises, and is stable from k = 2 on",
                grows(own[1]) and stable(own[2:], own[1][0]),
                _told(own[1:], 2),
            )
        )
    two, three = terms["(2)"], terms["(3)"]
    claims.append(
        claim(
            "chart (2): the second RBM raises the bound greatly, the first VAE slightly",
            grows(two[1]) and grows(two[2]) and two[2][0] < two[1][0],
            _told(two[1:], 2),
        )
    )
    claims.append(
        claim(
            "chart (3): the first two RBMs raise the bound and the next two do not",
            grows(three[1]) and stable(three[2:4], three[1][0]),
            _told(three[1:4], 2),
        )
    )
    claims.append(
        claim(
            "chart (3): after the RBMs have become stable, two VAEs raise the bound further",
            grows(_sum(three[4:])),
            _told(three[4:], 5),
        )
    )
    return claims
