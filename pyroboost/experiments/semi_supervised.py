"""Cascaded meta-models, the supplement's table of semi-supervised boosting on MNIST."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyroboost.compose import Cascade
from pyroboost.contexts import forked_rng
from pyroboost.data import keep_labels, labelled_batches
from pyroboost.evaluation.classification import class_probabilities
from pyroboost.evaluation.scores import accuracy, brier_score, expected_calibration_error
from pyroboost.experiments import parts
from pyroboost.experiments.parts import Images, Training
from pyroboost.experiments.record import over_seeds
from pyroboost.experiments.runner import Findings, Run
from pyroboost.experiments.semi_supervised_claims import (
    ACCURACY,
    BRIER,
    CALIBRATION,
    COLUMNS,
    PAPER,
    SHOWN,
    chart,
    verdicts,
)
from pyroboost.infer.greedy import greedy
from pyroboost.models import M2, VAE

__all__ = ["SIZES", "Sizes", "Top", "semi_supervised"]


@dataclass(frozen=True)
class Top:
    """The pair with the class variable and how it is trained.

    Args:
        training: epochs over the unlabelled images, batches, rates.
        unlabelled: training images used, labelled ones included; ``None``: all.
        labelled_per_batch: labelled images of each batch.
        units: width of the deterministic layer of each network.
        latent: dimension of z.
        labelled_weight: the weight b in J.
        classification_weight: that of the classification loss, in the columns that have it.
    """

    training: Training
    unlabelled: int | None = None
    labelled_per_batch: int = 50
    units: int = 500
    latent: int = 50
    labelled_weight: float = 0.5
    classification_weight: float = 1.0


@dataclass(frozen=True)
class Sizes:
    """Sizes and lengths of the table.

    Args:
        vae: how the VAE below is trained, once for all draws of labels.
        one: the pair on images.
        two: the pair on the VAE's latent variables.
        labels: numbers of labels.
        units: width of the VAE's deterministic layers.
        latent: latent dimensions of the VAE.
        num_samples: importance samples of z for each class.
        num_draws: draws of h for each test image.
        test: test images judged; ``None``: all.
    """

    vae: Training
    one: Top
    two: Top
    labels: tuple[int, ...] = (100, 600, 1000, 3000)
    units: int = 500
    latent: int = 20
    num_samples: int = 10
    num_draws: int = 10
    test: int | None = None


SIZES: dict[str, Sizes] = {
    "smoke": Sizes(
        Training(epochs=2),
        Top(Training(epochs=2), 300, 10, units=16, latent=2),
        Top(Training(epochs=2), 300, 10, units=16, latent=2),
        labels=(20, 60),
        units=32,
        latent=4,
        num_samples=2,
        num_draws=2,
        test=64,
    ),
    "cpu": Sizes(
        Training(epochs=12),
        Top(Training(epochs=15), 10_000, 20, 300, 20, classification_weight=20.0),
        Top(Training(epochs=25, batch_size=200), 20_000, 50, 300, 10, classification_weight=20.0),
        num_samples=20,
        num_draws=4,
        test=4000,
    ),
    "paper": Sizes(
        Training(epochs=200, patience=20),
        Top(Training(epochs=100, batch_size=200)),
        Top(Training(epochs=200, batch_size=200)),
        num_samples=50,
        num_draws=20,
    ),
}


def _labels(found: Images, top: Top, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training images that are used and the labels kept of them, -1 elsewhere."""
    rows = slice(None, top.unlabelled)
    generator = torch.Generator().manual_seed(seed)
    return found.train[rows], keep_labels(found.labels[rows], count, generator=generator)


def _model(vae: VAE, column: str, found: Images, sizes: Sizes, seed: int) -> Cascade:
    """Return an untrained model of a column; the VAE below is the trained one."""
    models, loss = COLUMNS[column]
    top = sizes.one if models == 1 else sizes.two
    size = found.train.shape[1] if models == 1 else sizes.latent
    pair = parts.seeded(
        seed,
        partial(
            M2,
            size,
            int(found.labels.max()) + 1,
            top.latent,
            likelihood="bernoulli" if models == 1 else "gaussian",
            units=top.units,
            labelled_weight=top.labelled_weight,
            classification_weight=top.classification_weight if loss else 0.0,
        ),
    )
    return Cascade(pair, args=[(0,)]) if models == 1 else Cascade(vae, pair, args=[(), (0,)])


def _train(
    run: Run, model: Cascade, found: Images, top: Top, *, count: int, seed: int, folder: str
) -> None:
    x, y = _labels(found, top, count, seed)
    training = top.training
    batches = labelled_batches(
        x,
        y,
        batch_size=training.batch_size,
        labelled_per_batch=min(top.labelled_per_batch, count),
    )
    boosted = greedy(
        model.to(run.device),
        batches,
        start=len(model) - 1,
        seed=100 * seed + 1,
        evaluate_on=500,
        checkpoints=run.checkpoints(f"seed{seed}", folder),
        epochs=training.epochs,
        lr=training.lr,
        scheduler=partial(CosineAnnealingLR, T_max=training.epochs),
        progress=run.progress,
    )
    run.say(f"seed {seed}, {folder}: {boosted.stages[-1].seconds:.0f} s")


Score = dict[str, tuple[float, float | None]]


def _judge(model: Cascade, found: Images, sizes: Sizes, seed: int) -> Score:
    """Measure p(y | h) and q(y | h) on test images: value and standard error by metric."""
    x, y = found.test[: sizes.test], found.test_labels[: sizes.test]
    scores: Score = {}
    for method in ("model", "guide"):
        with forked_rng(seed):
            p = class_probabilities(
                model,
                x,
                method=method,
                num_samples=sizes.num_samples,
                num_draws=sizes.num_draws,
            ).probabilities
        right = accuracy(p, y)
        error = math.sqrt(right * (1 - right) / len(y))
        scores[f"{ACCURACY} by the {method}, test"] = 100 * right, 100 * error
        scores[f"{CALIBRATION} by the {method}, test"] = expected_calibration_error(p, y), None
        scores[f"{BRIER} by the {method}, test"] = brier_score(p, y), None
    return scores


def semi_supervised(run: Run) -> Findings:
    """The supplement's table: test accuracy by number of labels, for one and for two models.

    Each seed is another draw of labels and of initial weights; the VAE below is trained once.
    """
    sizes, found = SIZES[run.scale], parts.images(run)
    vae = parts.seeded(
        run.seeds[0], partial(VAE, found.train.shape[1], sizes.latent, units=sizes.units)
    )
    parts.train(run, Cascade(vae), found, sizes.vae, seed=run.seeds[0], folder="vae")
    measured: dict[tuple[str, int], list[Score]] = {}
    for seed in run.seeds:
        for count in sizes.labels:
            for column in COLUMNS:
                folder = f"{count} labels, {column}"
                model = _model(vae, column, found, sizes, seed)
                top = sizes.one if len(model) == 1 else sizes.two
                _train(run, model, found, top, count=count, seed=seed, folder=folder)
                score = _judge(model, found, sizes, seed)
                measured.setdefault((column, count), []).append(score)
                run.say(f"seed {seed}, {folder}: {score[SHOWN][0]:.2f} per cent")
    rows = [row for key, scores in measured.items() for row in _rows(*key, scores)]
    accuracies = {key: [score[SHOWN][0] for score in scores] for key, scores in measured.items()}
    return Findings(
        data=found.words,
        settings=asdict(sizes),
        assumed=_assumed(sizes),
        rows=rows,
        shown=[
            f"{metric} by the {method}, test"
            for method in ("model", "guide")
            for metric in (ACCURACY, CALIBRATION, BRIER)
        ],
        claims=verdicts(accuracies),
        notes=_notes(sizes, found, len(run.seeds)),
        draw=partial(chart, rows=rows, labels=sizes.labels),
    )


def _rows(column: str, count: int, scores: Sequence[Score]) -> list[dict[str, Any]]:
    paper = PAPER.get(count)
    return [
        over_seeds(
            f"{column}, {count} labels",
            metric,
            [score[metric] for score in scores],
            kind="measure",
            unit="per cent" if metric.startswith(ACCURACY) else "share",
            paper=paper[list(COLUMNS).index(column)] if paper and metric == SHOWN else None,
        )
        for metric in scores[0]
    ]


def _assumed(sizes: Sizes) -> list[str]:
    one, two = sizes.one, sizes.two
    return [
        *parts.ASSUMED[:1],
        "early stopping: the VAE below keeps the weights with the best bound on the last 5,000 "
        "training digits, without their labels; the pairs with the class keep their last weights",
        "Adam at 0.001 with cosine decay to 0 over the epochs, batches of 100 for the VAE; "
        "rectified linear units; torch's initial weights",
        "M2 of Kingma et al. as the last model; the paper gives neither its networks nor a and b: "
        f"one layer of {one.units} units and {one.latent} latent dimensions on images, "
        f"{two.units} and {two.latent} on the VAE's {sizes.latent} latent dimensions; "
        f"b = {one.labelled_weight:g} and {two.labelled_weight:g}",
        f"batches of {one.training.batch_size} and {two.training.batch_size}, with "
        f"{one.labelled_per_batch} and {two.labelled_per_batch} labelled images in each",
        f"classification loss: log q(y given h) of labelled images, weighted "
        f"{one.classification_weight:g} and {two.classification_weight:g} beside J",
        "sizes, b and the weight of the classification loss were chosen by short runs judged on "
        "held-out training digits with their labels, never on test digits",
        "by the model: p(y given h), by the guide: q(y given h), both averaged over draws of h",
    ]


def _notes(sizes: Sizes, found: Images, draws: int) -> list[str]:
    used = [len(found.train[: top.unlabelled]) for top in (sizes.one, sizes.two)]
    return [
        "the text and the table's legend of the paper disagree on which columns have the "
        "classification loss; as in its text, the first two have none",
        f"{used[0]:,} training images serve the columns of one model and {used[1]:,} those of two, "
        f"for {sizes.one.training.epochs} and {sizes.two.training.epochs} epochs; the VAE below "
        f"has seen all {len(found.train):,}, without labels",
        f"{len(found.test[: sizes.test]):,} test images are judged",
        f"{draws} draw{'s' if draws > 1 else ''} of labels, equally many per class; the paper does "
        "not give its number",
        f"the densities behind p(y given h) have {sizes.num_samples} importance samples for each "
        "class; on images they are noisy, and the guide is the steadier of the two",
        "accuracy is in per cent, calibration error has 15 bins, and the Brier score is the sum "
        "over classes",
    ]
