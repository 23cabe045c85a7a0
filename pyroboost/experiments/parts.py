"""What the experiments on images share: data, training, bounds, and measures of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyroboost import data
from pyroboost.compose import Cascade
from pyroboost.contexts import forked_rng, service
from pyroboost.evaluation.bounds import Decomposition, decompose
from pyroboost.evaluation.likelihood import log_likelihood
from pyroboost.experiments.runner import Run
from pyroboost.handlers import capture, given, unobserve
from pyroboost.infer.greedy import Boosted, greedy
from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel

__all__ = [
    "ASSUMED",
    "Images",
    "Training",
    "as_images",
    "bounds",
    "distinguishable",
    "grey_share",
    "images",
    "importance_likelihood",
    "mean_images",
    "seeded",
    "share",
    "train",
]

T = TypeVar("T")

ASSUMED = (
    "binarisation: bits drawn once, each pixel on with its grey level as probability; the paper "
    "says only 'binarized'",
    "early stopping: the last 5,000 training digits are held out; the weights with their best "
    "bound are kept; test digits serve the final numbers only",
    "Adam at 0.001 with cosine decay to 0 over the epochs, batches of 100; rectified linear units; "
    "torch's initial weights",
)
_TRAIN_BITS_SEED = 2  # beside 0 and 1, which fix the validation and the test bits


@dataclass(frozen=True, eq=False)
class Images:
    """Bits of images.

    Args:
        train: training bits.  # (N, D)
        validation: held-out bits for early stopping.  # (V, D)
        test: bits for the final numbers.  # (M, D)
        labels: class numbers of the training images.  # (N,)
        test_labels: class numbers of the test images.  # (M,)
        shape: height and width.
        words: what they are.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    labels: Tensor
    test_labels: Tensor
    shape: tuple[int, ...]
    words: str


@dataclass(frozen=True)
class Training:
    """How each stage is trained.

    Args:
        epochs: passes over the training data.
        batch_size: data of a batch.
        lr: first learning rate of Adam; it decays to 0 along a cosine.
        patience: epochs without a better held-out bound after which to stop.
        annealing: epochs of a linear warm-up of the latent terms.
    """

    epochs: int
    batch_size: int = 100
    lr: float = 1e-3
    patience: int | None = None
    annealing: float | None = None


def images(run: Run) -> Images:
    """Return MNIST as bits drawn once; at smoke scale scikit-learn's 8 x 8 digits."""
    if run.scale == "smoke":
        found = data.digits("stochastic")
    else:
        found = data.mnist("stochastic", validation=5_000, folder=run.data_folder)
    return as_images(found, "bits drawn once with the grey levels as probabilities", run.device)


def as_images(found: data.Dataset, bits: str, device: str = "cpu") -> Images:
    """Return a data set's parts as tensors on a device; stochastic training bits are drawn once.

    Args:
        found: what a loader returned, with labels.
        bits: how its bits came about, in words.
        device: where they go.

    Raises:
        TypeError: a held-out part came as batches.
        ValueError: there are no labels.
    """
    train = found.train_tensor(generator=torch.Generator().manual_seed(_TRAIN_BITS_SEED))
    held_out, test = found.validation, found.test
    labels, test_labels = found.train_labels, found.test_labels
    if not (isinstance(held_out, Tensor) and isinstance(test, Tensor)):
        raise TypeError(f"as_images: held-out parts of {found.name} are batches; pass tensors.")
    if labels is None or test_labels is None:
        raise ValueError(f"as_images: {found.name} came without labels; place the label files.")
    name = {"digits": "scikit-learn's digits", "mnist": "MNIST"}.get(found.name, found.name)
    size = " x ".join(map(str, found.image_shape))
    rows = f"{len(train):,} training, {len(held_out):,} held-out and {len(test):,} test images"
    return Images(
        train=train.to(device),
        validation=held_out.to(device),
        test=test.to(device),
        labels=labels.to(device),
        test_labels=test_labels.to(device),
        shape=found.image_shape,
        words=f"{name}, {size}, {bits}; {rows}",
    )


def seeded(seed: int, build: Callable[[], T]) -> T:
    """Build something with initial weights from a seed, the global random state left as it was."""
    with forked_rng(seed):
        return build()


def train(
    run: Run,
    cascade: Cascade,
    found: Images,
    training: Training,
    *,
    seed: int,
    folder: str,
    start: int = 0,
    held_out: bool = True,
    stages: Mapping[int, Mapping[str, Any]] | None = None,
) -> Boosted:
    """Train the stages of a cascade from ``start`` on, or take them up where they were left.

    Args:
        run: the run; its checkpoints and device serve.
        cascade: the cascade.
        found: the data.
        training: epochs, batches and rates.
        seed: the run's seed.
        folder: where below the run's checkpoints these stages have theirs.
        start: first stage to be trained.
        held_out: whether held-out data choose the weights.
        stages: settings of single stages, as :func:`greedy` takes them.
    """
    boosted = greedy(
        cascade.to(run.device),
        found.train,
        validation=found.validation if held_out else None,
        start=start,
        seed=100 * seed,
        checkpoints=run.checkpoints(f"seed{seed}", folder),
        epochs=training.epochs,
        batch_size=training.batch_size,
        lr=training.lr,
        scheduler=partial(CosineAnnealingLR, T_max=training.epochs),
        patience=training.patience if held_out else None,
        annealing=training.annealing,
        stages=stages,
        progress=run.progress,
    )
    for stage in boosted.stages:
        run.say(
            f"seed {seed}, {folder}: stage {stage.index + 1} {stage.name}, {stage.seconds:.0f} s"
        )
    return boosted


def bounds(pair: MetaModel, x: Tensor, *, seed: int, num_samples: int) -> Decomposition:
    """Return the terms of the bound on data, from a random stream of its own."""
    cascade = pair if isinstance(pair, Cascade) else Cascade(pair)
    with forked_rng(seed):
        return decompose(cascade, x, num_samples=num_samples, num_importance=1)


def importance_likelihood(pair: MetaModel, x: Tensor, *, seed: int, num_samples: int) -> Likelihood:
    """Return importance-sampled log-likelihoods, from a random stream of its own."""
    with forked_rng(seed):
        return log_likelihood(pair, x, num_samples=num_samples)


def mean_images(pair: MetaModel, count: int, *, seed: int) -> Tensor:
    """Draw all hidden variables of a model and return the mean of the pixels given them.

    Args:
        pair: the model.
        count: how many.
        seed: of the draws.

    Returns:
        Probabilities of ones, or locations of normals.  # (count, D)
    """
    with forked_rng(seed):
        if isinstance(pair, Cascade) and len(pair) > 1:
            bottom: MetaModel = pair[0]
            hidden = pair[1:].sample(count)
        else:
            bottom = pair[0] if isinstance(pair, Cascade) else pair
            hidden = bottom.sample_hidden(count)
        with service(bottom), capture(bottom.visible) as site, unobserve(bottom.visible):
            given(bottom.model, {bottom.hidden: hidden})(bottom.template(count, hidden))
    assert site.msg is not None
    mean: Tensor = site.msg["fn"].mean
    return mean


def grey_share(means: Tensor, low: float = 0.1) -> Tensor:
    """Return the share of pixels of each image whose probability is neither near 0 nor near 1.

    Args:
        means: probabilities.  # (N, D)
        low: what counts as near.

    Returns:
        Shares: the lower, the sharper.  # (N,)
    """
    return ((means > low) & (means < 1 - low)).double().mean(-1)


def distinguishable(drawn: Tensor, known: Tensor, labels: Tensor, neighbours: int = 10) -> Tensor:
    """Tell which images look like one digit: nine tenths of their neighbours bear one label.

    Args:
        drawn: images, as probabilities or bits.  # (N, D)
        known: labelled images.  # (M, D)
        labels: their class numbers.  # (M,)
        neighbours: how many nearest images vote.

    Returns:
        1 where the vote is clear, else 0.  # (N,)
    """
    votes = []
    for rows in torch.split(drawn, 200):
        nearest = torch.cdist(rows, known).topk(neighbours, largest=False).indices
        counts = torch.nn.functional.one_hot(labels[nearest]).sum(1)
        votes.append(counts.max(-1).values >= math.ceil(0.9 * neighbours))
    return torch.cat(votes).double()


def share(values: Tensor) -> tuple[float, float]:
    """Return the mean of values and its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))
