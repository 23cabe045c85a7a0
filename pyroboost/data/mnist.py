"""MNIST in its four usual forms, and Cmnist, its small crop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyroboost.data.binarize import Binarization, binarize, check_binarization
from pyroboost.data.conventions import SIZES
from pyroboost.data.dataset import Dataset
from pyroboost.data.files import DataError, local_file
from pyroboost.data.formats import read_bits, read_idx

__all__ = ["cmnist", "mnist"]

Folder = str | os.PathLike[str] | None
_SIDE = 28


def mnist(
    binarization: Binarization | Literal["larochelle"] = "threshold",
    *,
    validation: int = 10_000,
    seed: int = 0,
    batch_size: int = 100,
    folder: Folder = None,
) -> Dataset:
    """Return the handwritten digits of MNIST, 28 x 28, ink 1.

    1. ``"threshold"``: bits, 1 where the grey level exceeds one half.
    2. ``"stochastic"``: training bits drawn anew each epoch with the grey levels as
       probabilities (kept at ``train.probabilities``); held-out bits drawn once, by ``seed``.
    3. ``"raw"``: grey levels in [0, 1].
    4. ``"larochelle"``: the fixed bits of Hugo Larochelle, from his three files, without labels
       and with his own split.

    Args:
        binarization: see above.
        validation: how many of the last training digits become the validation part; 0 for none.
            Larochelle's validation part is his own.
        seed: of the held-out bits of ``"stochastic"``.
        batch_size: of the training batches of ``"stochastic"``.
        folder: the data folder; see :func:`pyroboost.data.data_folder`.

    Returns:
        The data set, rows of 784.

    Raises:
        DataError: a file is missing and cannot be fetched, or is damaged.
        ValueError: an unknown binarisation, or more validation digits than there are.

    Reference:
        LeCun et al., "Gradient-based learning applied to document recognition", 1998;
        Larochelle and Murray, "The neural autoregressive distribution estimator", 2011.
    """
    check_binarization("mnist", binarization, "larochelle")
    if binarization == "larochelle":
        return _larochelle(folder)
    images, labels = _part("train", folder)
    test, test_labels = _part("test", folder)
    if not 0 <= validation < len(images):
        raise ValueError(
            f"mnist: validation is {validation} of {len(images)} training digits; leave some."
        )
    cut = len(images) - validation
    split = f"validation: the last {validation:,} training digits" if validation else ""
    grey = Dataset(
        name="mnist",
        train=images[:cut],
        validation=images[cut:] if validation else None,
        test=test,
        image_shape=(_SIDE, _SIDE),
        notes=split,
        train_labels=labels[:cut],
        validation_labels=labels[cut:] if validation else None,
        test_labels=test_labels,
    )
    return binarize(grey, binarization, seed=seed, batch_size=batch_size)


def cmnist(
    binarization: Binarization = "raw",
    *,
    seed: int = 0,
    batch_size: int = 100,
    folder: Folder = None,
) -> Dataset:
    """Return Cmnist: the 10 x 10 centres of the first 12,000 training digits of MNIST.

    The grey levels are kept and are probabilities of ones: a model's log-likelihood of a datum is
    its expectation over such bits. The paper leaves open which 12,000 digits; these are the first
    ones, in order. Independent bits fitted to the training part reach -66.40 nats on this
    validation part, the paper's -67.38 on its own, so numbers compare only roughly.

    Args:
        binarization: ``"raw"`` keeps the probabilities; see :func:`mnist` for the others.
        seed: of the held-out bits of ``"stochastic"``.
        batch_size: of the training batches of ``"stochastic"``.
        folder: the data folder; see :func:`pyroboost.data.data_folder`.

    Returns:
        The data set: 4,000 / 4,000 / 4,000 rows of 100.

    Raises:
        DataError: a file is missing and cannot be fetched, is damaged, or holds too few digits.
        ValueError: an unknown binarisation.

    Reference:
        Arnold and Ollivier, "Layer-wise learning of deep generative models", 2012, section 3.1.
    """
    check_binarization("cmnist", binarization)
    images, labels = _part("train", folder)
    sizes = SIZES["cmnist"]
    if len(images) < sum(sizes):
        raise DataError(
            f"cmnist: {sum(sizes):,} training digits of MNIST are needed and the file holds "
            f"{len(images):,}; put the whole file in its place."
        )
    low = (_SIDE - 10) // 2
    crop = images.view(-1, _SIDE, _SIDE)[: sum(sizes), low : low + 10, low : low + 10]
    train, validation, test = torch.split(crop.reshape(-1, 100), list(sizes))
    tags = torch.split(labels[: sum(sizes)], list(sizes))
    grey = Dataset(
        "cmnist",
        train,
        validation,
        test,
        image_shape=(10, 10),
        notes="the first 12,000 training digits of MNIST, in order",
        train_labels=tags[0],
        validation_labels=tags[1],
        test_labels=tags[2],
    )
    return binarize(grey, binarization, seed=seed, batch_size=batch_size)


def _part(name: str, folder: Folder) -> tuple[Tensor, Tensor]:
    path = local_file(f"mnist.{name}", folder)
    images = read_idx(path)
    if images.ndim != 3 or images.shape[1:] != (_SIDE, _SIDE):
        raise DataError(
            f"mnist: {path} holds an array of shape {images.shape}, not of images of 28 x 28; put "
            "the right file in its place."
        )
    labels_path = local_file(f"mnist.{name}_labels", folder)
    labels = read_idx(labels_path)
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"mnist: {labels_path} holds labels of shape {labels.shape} for {len(images):,} "
            "images; put files that belong together in their places."
        )
    grey = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / np.float32(255))
    return grey, torch.from_numpy(labels.astype(np.int64))


def _larochelle(folder: Folder) -> Dataset:
    def bits(path: Path) -> Tensor:
        return torch.from_numpy(read_bits(path, _SIDE * _SIDE)).float()

    parts = [local_file(f"larochelle.{name}", folder) for name in ("train", "validation", "test")]
    train, validation, test = map(bits, parts)
    return Dataset(
        "mnist",
        train,
        validation,
        test,
        image_shape=(_SIDE, _SIDE),
        notes="Larochelle's fixed bits and split",
    )
