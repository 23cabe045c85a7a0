"""Cascaded meta-models, Table 3: cascade, parallel and hybrid boosting, with the price of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyroboost.compose import Cascade, Product
from pyroboost.contexts import forked_rng
from pyroboost.evaluation.likelihood import elbo, log_likelihood
from pyroboost.experiments import parts
from pyroboost.experiments.cascade import BOUND, LIKELIHOOD, pooled
from pyroboost.experiments.figures import sample_grids
from pyroboost.experiments.parts import Images, Training
from pyroboost.experiments.record import claim, over_seeds
from pyroboost.experiments.runner import Findings, Run
from pyroboost.infer.multiplicative import multiplicative
from pyroboost.metamodel import MetaModel
from pyroboost.models import GMM, VAE, BernoulliMixture

__all__ = ["PAPER", "Sizes", "table3", "verdicts"]

TRAINING, DENSITY, SAMPLING = "training time", "density estimation time", "sampling time"
EFFECTIVE, LOG_Z = "effective draws of 10,000", "log Z"
K_HAT, ESS = "k-hat of log Z", "ESS of log Z"
PAPER: dict[str, tuple[float, float, float, float]] = {
    "VAE + VAE": (-99.53, 223.85, 0.42, 0.13),
    "VAE + GMM": (-98.13, 116.33, 0.14, 0.12),
    "VAE || VAE": (-95.72, 225.21, 50.91, 543.82),
    "VAE || GMM on bits": (-506.76, 2471.60, 130.65, 480.95),
    "(VAE + GMM) || VAE": (-94.28, 225.23, 125.20, 1681.77),
    "(VAE + GMM) || (VAE + GMM)": (-93.94, 226.86, 147.82, 2612.59),
}
"""The paper's rows: log p(x) or its bound, and seconds of training, densities and samples."""
EXTRA = "VAE || Bernoulli mixture"
_CASCADES = ("VAE", "VAE + VAE", "VAE + GMM")


@dataclass(frozen=True)
class Sizes:
    """Sizes and lengths.

    Args:
        training: how each VAE is trained.
        units: width of the VAEs' deterministic layers.
        latent: their latent dimensions.
        components: components of the mixtures.
        bound_samples: draws per test image for the bound of the cascades.
        importance_samples: samples per image for densities that are not known.
        draws: draws for log Z.
        samples: images drawn to time sampling.
        chains: chains that draw them from a product.
        least: effective sample size of the training weights at least, as a share.
    """

    training: Training
    units: int = 500
    latent: int = 20
    components: int = 10
    bound_samples: int = 5
    importance_samples: int = 20
    draws: int = 10_000
    samples: int = 10_000
    chains: int = 100
    least: float = 0.5


SIZES: dict[str, Sizes] = {
    "smoke": Sizes(
        Training(epochs=1),
        units=16,
        latent=3,
        components=3,
        bound_samples=2,
        importance_samples=5,
        draws=200,
        samples=100,
        chains=5,
    ),
    "cpu": Sizes(Training(epochs=15)),
    "paper": Sizes(
        Training(epochs=200, patience=20), importance_samples=200, draws=50_000, chains=500
    ),
}


class _Model(NamedTuple):
    pair: MetaModel
    seconds: float  # of training, its parts' included


class _Builder:
    """Trains what the rows of one seed are made of, each once."""

    def __init__(self, run: Run, found: Images, sizes: Sizes, seed: int) -> None:
        self.run, self.found, self.sizes, self.seed = run, found, sizes, seed
        self.count = 0

    def vae(self, *, above: bool = False) -> VAE:
        """Return an untrained VAE over the images, or over the z of another."""
        sizes, self.count = self.sizes, self.count + 1
        dim = sizes.latent if above else self.found.train.shape[1]
        make = partial(VAE, units=sizes.units, likelihood="gaussian" if above else "bernoulli")
        return parts.seeded(1000 * self.seed + self.count, partial(make, dim, sizes.latent))

    def gmm(self, dim: int, covariance: str = "full") -> GMM:
        """Return an untrained mixture of normals."""
        make = partial(GMM, self.sizes.components, dim, covariance=covariance)  # type: ignore[arg-type]
        return parts.seeded(1000 * self.seed + self.count, make)

    def grow(self, below: _Model | None, stage: MetaModel, folder: str) -> _Model:
        """Train one more stage of a cascade."""
        cascade = Cascade(stage) if below is None else Cascade(below.pair, stage)
        boosted = parts.train(
            self.run,
            cascade,
            self.found,
            self.sizes.training,
            seed=self.seed,
            folder=folder,
            start=len(cascade) - 1,
        )
        seconds = boosted.stages[-1].seconds
        return _Model(cascade, seconds + (0.0 if below is None else below.seconds))

    def multiply(self, first: _Model, second: MetaModel, folder: str) -> _Model:
        """Train a second part on reweighted data and return the geometric mean of both."""
        sizes, training = self.sizes, self.sizes.training
        samples = sizes.importance_samples
        began = time.perf_counter()
        result = multiplicative(
            Product(first.pair, second, powers=0.5, num_samples=samples),
            self.found.train,
            validation=self.found.validation,
            alphas=0.5,
            least=sizes.least,
            start=1,
            num_draws=sizes.draws,
            checkpoints=self.run.checkpoints(f"seed{self.seed}", folder),
            seed=100 * self.seed,
            epochs=training.epochs,
            batch_size=training.batch_size,
            lr=training.lr,
            scheduler=partial(CosineAnnealingLR, T_max=training.epochs),
            patience=training.patience,
            progress=self.run.progress,
        )
        self.run.say(f"seed {self.seed}, {folder}: {result.rounds[-1].seconds:.0f} s\n{result}")
        return _Model(result.product, first.seconds + time.perf_counter() - began)


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def _cascade_cells(model: _Model, found: Images, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Measure a cascade: bound, likelihood and times."""
    with forked_rng(seed):
        _, density = _timed(lambda: elbo(model.pair, found.test))
        _, sampling = _timed(lambda: model.pair.sample(sizes.samples))
    bound = parts.bounds(model.pair, found.test, seed=seed, num_samples=sizes.bound_samples)
    likelihood = parts.importance_likelihood(
        model.pair, found.test, seed=seed, num_samples=sizes.importance_samples
    )
    return {
        BOUND: (bound.elbo, bound.elbo_error),
        LIKELIHOOD: (likelihood.mean, likelihood.standard_error),
        TRAINING: (model.seconds, None),
        DENSITY: (density, None),
        SAMPLING: (sampling, None),
    }


def _product_cells(
    model: _Model, found: Images, sizes: Sizes, seed: int
) -> tuple[dict[str, Any], Tensor]:
    """Measure a product: likelihood with log Z and what speaks against it, times, some draws."""
    product = model.pair
    assert isinstance(product, Product)
    with forked_rng(seed):
        partition, first = _timed(lambda: product.log_partition(num_draws=sizes.draws))
        likelihood, second = _timed(lambda: log_likelihood(product, found.test))
        draws = -(-sizes.samples // sizes.chains)
        chains, sampling = _timed(lambda: product.chains(num_chains=sizes.chains, num_draws=draws))
    # A log Z in doubt has no standard error to be told, and neither has what it normalises.
    sure = partition.reliable
    cells = {
        LIKELIHOOD: (likelihood.mean, likelihood.standard_error if sure else None),
        TRAINING: (model.seconds, None),
        DENSITY: (first + second, None),
        SAMPLING: (sampling, None),
        EFFECTIVE: (chains.ess_log_density * sizes.samples / (sizes.chains * draws), None),
        LOG_Z: (partition.value, partition.std_error if sure else None),
        K_HAT: (partition.pareto_k, None),
        ESS: (partition.ess, None),
    }
    return cells, chains.values.reshape(-1, *chains.values.shape[2:])[:: max(1, draws // 2)]


def _models(builder: _Builder) -> dict[str, _Model]:
    """Train the models of all rows."""
    pixels, latent = builder.found.train.shape[1], builder.sizes.latent
    vae = builder.grow(None, builder.vae(), "vae")
    cascade = builder.grow(vae, builder.gmm(latent), "vae-gmm")
    found = {
        "VAE": vae,
        "VAE + VAE": builder.grow(vae, builder.vae(above=True), "vae-vae"),
        "VAE + GMM": cascade,
        "VAE || VAE": builder.multiply(vae, builder.vae(), "vae-par-vae"),
    }
    normals, seconds = _timed(lambda: _on_bits(builder, pixels))
    found["VAE || GMM on bits"] = _geometric(vae, _Model(normals, seconds), builder)
    mixture = parts.seeded(
        builder.seed, partial(BernoulliMixture, builder.sizes.components, pixels)
    )
    found[EXTRA] = builder.multiply(vae, mixture, "vae-par-bits")
    found["(VAE + GMM) || VAE"] = builder.multiply(cascade, builder.vae(), "hybrid-vae")
    second = Cascade(builder.vae(), builder.gmm(latent))
    found["(VAE + GMM) || (VAE + GMM)"] = builder.multiply(cascade, second, "hybrid-both")
    return found


def _on_bits(builder: _Builder, pixels: int) -> MetaModel:
    gmm = builder.gmm(pixels, "diag")
    with forked_rng(builder.seed):
        # Pixels that are never on would have no variance at all, and so no mass anywhere else.
        gmm.fit_em(builder.found.train, start="kmeans", restarts=1, variance_floor=1e-2)
    return gmm.on_bits()


def _geometric(one: _Model, two: _Model, builder: _Builder) -> _Model:
    samples = builder.sizes.importance_samples
    product = Product(one.pair, two.pair, powers=0.5, num_samples=samples)
    return _Model(product, one.seconds + two.seconds)


_UNITS = {
    TRAINING: "s",
    DENSITY: "s",
    SAMPLING: "s",
    EFFECTIVE: "draws",
    ESS: "draws",
    K_HAT: "number",
}
_LEAST_ESS = 100  # below, an estimate of log Z has not seen enough of where its weights are large
_PAPER_METRICS = (TRAINING, DENSITY, SAMPLING)


def _rows(name: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    paper = PAPER.get(name)
    rows = []
    for metric in runs[0]:
        kind = {BOUND: "bound", LIKELIHOOD: "estimate", LOG_Z: "estimate"}.get(metric, "measure")
        number = None
        if paper is not None and metric in _PAPER_METRICS:
            number = paper[1 + _PAPER_METRICS.index(metric)]
        elif paper is not None and metric == (BOUND if name in _CASCADES else LIKELIHOOD):
            number = paper[0]
        rows.append(
            over_seeds(
                name,
                metric,
                [run[metric] for run in runs],
                kind=kind,
                unit=_UNITS.get(metric, "nats"),
                paper=number,
            )
        )
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check what section 4.4 says of Table 3.

    Args:
        rows: the table's rows.

    Returns:
        The claims.
    """
    cells = {(row["name"], row["metric"]): row for row in rows}

    read = partial(pooled, rows)

    def told(*names: str) -> str:
        return ", ".join(f"{n}: {told_one(cells[n, LIKELIHOOD])}" for n in names)

    def told_one(row: dict[str, Any]) -> str:
        if row["std_error"] is None:
            return f"{row['value']:.2f} (log Z in doubt)"
        return f"{row['value']:.2f} ± {row['std_error']:.2f}"

    # All models are judged on the same images, whose spread is common to them: the order counts.
    best = {name: read(name, LIKELIHOOD)[0] for name in ("VAE", *PAPER)}
    hybrids = [n for n in PAPER if n.startswith("(")]
    cascades, parallel = ("VAE + VAE", "VAE + GMM"), "VAE || VAE"
    times = {name: [read(name, m)[0] for m in (DENSITY, SAMPLING)] for name in PAPER}
    slow, fast = [parallel, *hybrids], list(cascades)
    evidence = {n: (cells[n, K_HAT]["value"], cells[n, ESS]["value"]) for n, m in cells if m == ESS}
    return [
        claim(
            "hybrid boosting gives the highest likelihood",
            max(best, key=lambda n: best[n]) in hybrids,
            told("VAE", *PAPER),
        ),
        claim(
            "a parallel pair of VAEs has a higher likelihood than either cascade",
            best[parallel] > max(best[n] for n in cascades),
            told(parallel, *cascades),
        ),
        claim(
            "a VAE parallel to a Gaussian mixture is far worse than the VAE alone",
            best["VAE || GMM on bits"] < best["VAE"] - 10,
            told("VAE", "VAE || GMM on bits", EXTRA),
        ),
        claim(
            "densities and samples of products cost at least ten times those of cascades",
            all(min(times[n][i] for n in slow) > 10 * max(times[n][i] for n in fast)
                for i in range(2)),
            "; ".join(f"{n}: {a:.2f} s, {b:.2f} s" for n, (a, b) in times.items()),
        ),
        claim(
            "log Z of every product can be trusted (Pareto k at most 0.7, effective draws at least "
            f"{_LEAST_ESS}); not the paper's claim, but what its numbers need",
            all(k <= 0.7 and ess >= _LEAST_ESS for k, ess in evidence.values()),
            ", ".join(f"{n}: k {k:.2f}, {ess:.0f} draws" for n, (k, ess) in evidence.items()),
        ),
    ]  # fmt: skip


def table3(run: Run) -> Findings:
    """Table 3: likelihood and times of cascades, products and hybrids."""
    sizes, found = SIZES[run.scale], parts.images(run)
    measured: dict[str, list[dict[str, Any]]] = {}
    pictures: dict[str, Tensor] = {}
    for seed in run.seeds:
        models = _models(_Builder(run, found, sizes, seed))
        for name, model in models.items():
            if name in _CASCADES:
                cells = _cascade_cells(model, found, sizes, seed)
                drawn = parts.mean_images(model.pair, 64, seed=seed)
            else:
                cells, drawn = _product_cells(model, found, sizes, seed)
            measured.setdefault(name, []).append(cells)
            pictures.setdefault(name, drawn[:64])
            run.say(
                f"seed {seed}, {name}: " + ", ".join(f"{k} {v[0]:.4g}" for k, v in cells.items())
            )
    rows = [row for name, runs in measured.items() for row in _rows(name, runs)]
    shown = {n: p for n, p in pictures.items() if n != "VAE + VAE"}
    return Findings(
        data=found.words,
        settings=asdict(sizes),
        assumed=[
            *parts.ASSUMED,
            f"at most {sizes.training.epochs} epochs a VAE",
            "parallel parts are multiplied to powers of one half each (the paper gives no powers); "
            "the second part is trained on data reweighted by the first, the exponent of the "
            f"weights lowered until their effective sample size is {sizes.least:g} of the data",
            "a Gaussian mixture has a density on real numbers and a VAE one on bits: 'GMM on bits' "
            "is a diagonal mixture renormalised over all images of bits, and a Bernoulli mixture "
            "stands beside it",
        ],
        rows=rows,
        shown=[BOUND, LIKELIHOOD, TRAINING, DENSITY, SAMPLING, EFFECTIVE, LOG_Z, K_HAT, ESS],
        claims=verdicts(rows),
        notes=[
            "likelihoods of products are estimates, no bounds: densities of VAEs are importance-"
            f"sampled with {sizes.importance_samples} samples an image, log Z with "
            f"{sizes.draws:,} draws of the parts; a power of one half of such an estimate is "
            "biased low, in log Z and in the density alike",
            f"sampling: {sizes.samples:,} images, of products by {sizes.chains} independence "
            "Metropolis chains whose effective draws stand beside the time",
            "the figure shows probabilities of pixels for cascades and draws of bits for products",
            "density estimation: the bound of the test images by one draw each for cascades, log Z "
            "and all test densities for products; seconds of a machine shared with other jobs",
        ],
        draw=partial(_draw, pictures=shown, shape=found.shape),
    )


def _draw(path: Path, *, pictures: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    sample_grids(path, pictures, shape)
