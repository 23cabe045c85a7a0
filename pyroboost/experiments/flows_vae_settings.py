"""Gradient boosted flows, Table 1 and Figure 3: data, sizes and the paper's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyroboost import data
from pyroboost.data.files import DataError
from pyroboost.experiments.runner import Run, Scale

__all__ = ["MODELS", "PAPER", "Kind", "Pictures", "Sizes", "pictures", "sizes_of"]

Kind = Literal["frey", "mnist", "caltech", "omniglot"]
MODELS = ("VAE", "Planar", "Radial", "Sylvester", "IAF", "RealNVP", "GBF", "GBF+")
_NUMBERS: dict[Kind, tuple[tuple[float, float], ...]] = {
    "mnist": (
        (89.32, 84.97), (86.47, 83.16), (88.43, 84.32), (84.54, 81.99),
        (86.46, 83.14), (88.04, 83.36), (87.18, 82.70), (87.12, 82.67),
    ),
    "frey": (
        (4.84, 4.78), (4.64, 4.60), (4.73, 4.68), (4.54, 4.49),
        (4.73, 4.70), (4.66, 4.62), (4.56, 4.48), (4.51, 4.41),
    ),
    "omniglot": (
        (109.77, 103.16), (105.72, 100.18), (108.74, 102.07), (101.99, 98.54),
        (106.34, 100.97), (106.22, 100.43), (105.53, 99.11), (105.60, 99.09),
    ),
    "caltech": (
        (120.98, 108.43), (116.70, 104.23), (118.89, 106.88), (112.26, 100.38),
        (119.62, 108.41), (123.26, 113.00), (124.15, 107.92), (121.06, 106.55),
    ),
}  # fmt: skip
PAPER = {kind: dict(zip(MODELS, numbers, strict=True)) for kind, numbers in _NUMBERS.items()}
"""-ELBO and NLL of each model: bits per dimension for the Frey faces, else nats."""


@dataclass(frozen=True)
class Sizes:
    """Sizes and lengths.

    Args:
        first: passes over the data for the first component.
        epochs: passes for each further one.
        components: C of the boosted model.
        finetune: passes for each component in the fine-tuning of GBF+.
        frozen: whether encoder and decoder stay as the first component's training left them, so
            that boosting changes the posterior alone.
        objective: of a round in which they train, as in :func:`pyroboost.infer.boost`.
        network: the convolutional one of the paper's appendix B, or a small dense one.
        width: units of the dense network's layers.
        layers: its layers.
        channels: of the convolutional encoder.
        decoder_channels: of the convolutional decoder.
        context: features that amortised flows take.
        latent: dimension of z.
        steps: flow steps of planar, radial and Sylvester.
        couplings: steps K of IAF, of RealNVP and of each component.
        units: width of their hidden layers.
        vectors: orthogonal vectors of a Sylvester step.
        batch_size: data of a batch.
        patience: epochs without a better held-out bound after which to stop.
        test: test images used; all where ``None``.
        importance: importance samples per test image.
    """

    first: int
    epochs: int
    components: int = 4
    finetune: int = 50
    frozen: bool = False
    objective: str = "residual"
    network: Literal["gated", "dense"] = "gated"
    width: int = 300
    layers: int = 2
    channels: tuple[int, int, int] = (16, 32, 256)
    decoder_channels: tuple[int, int, int] = (32, 16, 16)
    context: int = 256
    latent: int = 64
    steps: int = 16
    couplings: int = 8
    units: int = 256
    vectors: int = 32
    batch_size: int = 100
    patience: int | None = None
    test: int | None = None
    importance: int = 2000

    @property
    def total(self) -> int:
        """Epochs of a model that is not boosted: those in which a boosted one's networks train."""
        return self.first + (0 if self.frozen else self.epochs * (self.components - 1))


_SMOKE: dict[str, Any] = {
    "first": 2,
    "epochs": 2,
    "components": 2,
    "finetune": 1,
    "latent": 3,
    "steps": 2,
    "couplings": 1,
    "units": 8,
    "vectors": 2,
    "test": 40,
    "importance": 5,
}
_SMALL: dict[str, Any] = {
    "objective": "mixture",
    "latent": 32,
    "steps": 8,
    "couplings": 4,
    "units": 64,
    "vectors": 8,
    "test": 1000,
}
_DENSE: dict[str, Any] = {"network": "dense", "context": 64}
_SLIM: dict[str, Any] = {"channels": (8, 16, 64), "decoder_channels": (16, 8, 8), "context": 64}
_TINY: dict[str, Any] = {"channels": (2, 4, 8), "decoder_channels": (4, 2, 2), "context": 8}


def sizes_of(kind: Kind, scale: Scale) -> Sizes:
    """Return the sizes of a table at a scale."""
    if scale == "smoke":
        shape = _TINY if kind == "frey" else {**_DENSE, "width": 16, "context": 4}
        return Sizes(**_SMOKE, **shape, frozen=kind == "caltech")
    if scale == "paper":
        units = 512 if kind in ("mnist", "omniglot") else 256
        return Sizes(first=1000, epochs=1000, units=units, patience=100)
    # Where a step is dear, by its convolutions or since epochs are few, boosting changes the
    # posterior alone; else the networks train with it, at the price of C runs a step.
    if kind == "frey":
        return Sizes(
            first=60, epochs=30, finetune=10, frozen=True, batch_size=25, **_SMALL, **_SLIM
        )
    if kind == "caltech":
        return Sizes(first=60, epochs=30, finetune=10, **_SMALL, **_DENSE)
    return Sizes(first=10, epochs=3, finetune=2, frozen=True, **_SMALL, **_DENSE)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images.

    Args:
        train: training images, or batches of bits that are drawn anew in every epoch.
        validation: held-out images for early stopping and for the decisions of boosting.
        test: images for the final numbers.
        shape: height and width.
        words: what they are.
        levels: number of grey levels; 0 for bits.
    """

    train: Any
    validation: Tensor
    test: Tensor
    shape: tuple[int, ...]
    words: str
    levels: int = 0

    @property
    def dim(self) -> int:
        """Number of pixels."""
        return int(self.test.shape[1])


def pictures(run: Run, kind: Kind) -> Pictures:
    """Return the images of a table; at smoke scale scikit-learn's 8 x 8 digits in their place."""
    found, words, levels = _smoke(kind) if run.scale == "smoke" else _real(run, kind)
    train = found.train
    if kind != "omniglot":
        train = found.train_tensor(generator=torch.Generator().manual_seed(2)).to(run.device)
        train = train[:400] if run.scale == "smoke" else train
    validation, test = found.validation, found.test
    assert isinstance(validation, Tensor)
    assert isinstance(test, Tensor)
    count = sizes_of(kind, run.scale).test
    kept = test[:count]
    rows = len(train) if isinstance(train, Tensor) else train.num_rows
    size = " x ".join(map(str, found.image_shape))
    return Pictures(
        train=train,
        validation=validation.to(run.device),
        test=kept.to(run.device),
        shape=found.image_shape,
        words=f"{words}, {size}; {rows:,} training, {len(validation):,} held-out and {len(kept):,} "
        f"of {len(test):,} test images",
        levels=levels,
    )


def _smoke(kind: Kind) -> tuple[data.Dataset, str, int]:
    if kind == "frey":
        return data.digits("raw", validation=100), "scikit-learn's digits, 17 grey levels", 17
    if kind == "omniglot":
        found = data.digits("stochastic", validation=100)
        return found, "scikit-learn's digits, bits drawn anew each epoch", 0
    return data.digits(validation=100), "scikit-learn's digits, bits by threshold", 0


def _real(run: Run, kind: Kind) -> tuple[data.Dataset, str, int]:
    folder = run.data_folder
    if kind == "frey":
        return data.frey_faces(folder=folder), "Frey faces, 256 grey levels, split by seed 0", 256
    if kind == "omniglot":
        found = data.omniglot("stochastic", folder=folder)
        return found, "Omniglot, training bits drawn anew each epoch, held-out bits once", 0
    if kind == "mnist":
        try:
            return data.mnist("larochelle", folder=folder), "MNIST, Larochelle's fixed bits", 0
        except DataError:
            found = data.mnist("stochastic", folder=folder)
            return found, "MNIST, all bits drawn once with the grey levels as probabilities", 0
    try:
        return data.caltech_silhouettes(folder=folder), "Caltech-101 silhouettes, split 1", 0
    except DataError:
        found = data.caltech_silhouettes("seeded", folder=folder)
        words = "Caltech-101 silhouettes, a seeded split of split 1's sizes (not split 1 itself)"
        return found, words, 0
