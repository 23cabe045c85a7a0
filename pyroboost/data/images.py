"""Frey faces, Caltech-101 silhouettes, Omniglot and scikit-learn's digits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyroboost.data.binarize import Binarization, binarize, check_binarization
from pyroboost.data.conventions import SIZES
from pyroboost.data.dataset import Dataset
from pyroboost.data.files import DataError, local_file
from pyroboost.data.formats import read_mat
from pyroboost.data.splits import seeded_split

__all__ = ["caltech_silhouettes", "digits", "frey_faces", "omniglot"]

Array = npt.NDArray[Any]
Folder = str | os.PathLike[str] | None


def frey_faces(*, seed: int = 0, folder: Folder = None) -> Dataset:
    """Return the 1,965 Frey faces, grey levels in [0, 1], 28 x 20.

    The film's frames follow one another closely, so the split is of a seeded order: 1,565 / 200 /
    200.

    Args:
        seed: of the split.
        folder: the data folder; see :func:`pyroboost.data.data_folder`.

    Returns:
        The data set, rows of 560.

    Raises:
        DataError: the file is missing and cannot be fetched, or is not the Frey faces.
    """
    path = local_file("frey_faces", folder)
    pixels = _shaped(read_mat(path, "ff")["ff"], (560, sum(SIZES["frey_faces"])), path, "ff")
    faces = torch.from_numpy(np.ascontiguousarray(pixels.T).astype(np.float32) / np.float32(255))
    train, validation, test = (faces[rows] for rows in _parts("frey_faces", len(faces), seed))
    notes = f"grey levels; split by seed {seed}"
    return Dataset("frey_faces", train, validation, test, image_shape=(28, 20), notes=notes)


def caltech_silhouettes(
    split: Literal["official", "seeded"] = "official", *, seed: int = 0, folder: Folder = None
) -> Dataset:
    """Return the 8,671 Caltech-101 silhouettes, bits, 28 x 28, the shape 1.

    1. ``"official"``: the split that papers use, from ``caltech101_silhouettes_28_split1.mat``.
    2. ``"seeded"``: parts of the same sizes (4,100 / 2,264 / 2,307) of a seeded order of all, from
       ``caltech101_silhouettes_28.mat``; numbers on it do not compare with published ones.

    Args:
        split: see above.
        seed: of the order of ``"seeded"``.
        folder: the data folder; see :func:`pyroboost.data.data_folder`.

    Returns:
        The data set, rows of 784, with the 101 classes as labels from 0.

    Raises:
        DataError: the file is missing and cannot be fetched, or is not the silhouettes.
        ValueError: ``split`` is another word.

    Reference:
        Marlin, Swersky, Chen and de Freitas, "Inductive principles for restricted Boltzmann
        machine learning", 2010.
    """
    if split not in ("official", "seeded"):
        raise ValueError(f"caltech_silhouettes: split is {split!r}; take official or seeded.")
    path = local_file(f"caltech.{split}", folder)
    (train, train_y), (validation, validation_y), (test, test_y) = (
        _silhouettes(path, pixels, labels, size)
        for (pixels, labels), size in zip(
            _official(path) if split == "official" else _seeded(path, seed),
            SIZES["caltech_silhouettes"],
            strict=True,
        )
    )
    return Dataset(
        name="caltech_silhouettes",
        train=train,
        validation=validation,
        test=test,
        image_shape=(28, 28),
        notes="split 1" if split == "official" else f"seeded split (seed {seed}), not split 1",
        train_labels=train_y,
        validation_labels=validation_y,
        test_labels=test_y,
    )


def _official(path: Path) -> list[tuple[Array, Array]]:
    names = ("train", "val", "test")
    held = read_mat(path, *(f"{name}_{kind}" for name in names for kind in ("data", "labels")))
    return [(held[f"{name}_data"], held[f"{name}_labels"]) for name in names]


def _seeded(path: Path, seed: int) -> list[tuple[Array, Array]]:
    held = read_mat(path, "X", "Y")
    num = sum(SIZES["caltech_silhouettes"])
    pixels = _shaped(held["X"], (num, 784), path, "X")
    labels = _shaped(held["Y"].reshape(-1), (num,), path, "Y")
    parts = _parts("caltech_silhouettes", num, seed)
    return [(pixels[rows.numpy()], labels[rows.numpy()]) for rows in parts]


def _silhouettes(path: Path, pixels: Array, labels: Array, size: int) -> tuple[Tensor, Tensor]:
    bits = _shaped(pixels, (size, 784), path, "images")
    classes = _shaped(labels.reshape(-1), (size,), path, "labels")
    if not bool(np.isin(bits, (0, 1)).all()):
        raise _unlike(path, "holds values other than 0 and 1")
    # The file has the shape as 0 on a ground of 1, and classes from 1.
    return 1.0 - _upright(bits), torch.from_numpy(classes.astype(np.int64) - 1)


def omniglot(
    binarization: Binarization = "stochastic",
    *,
    validation: int = 1345,
    seed: int = 0,
    batch_size: int = 100,
    folder: Folder = None,
) -> Dataset:
    """Return the 28 x 28 Omniglot characters of ``chardata.mat``, ink 1.

    Args:
        binarization: as for :func:`pyroboost.data.mnist`.
        validation: how many of a seeded order of the 24,345 training characters become the
            validation part; 0 for none.
        seed: of that order, and of the held-out bits of ``"stochastic"``.
        batch_size: of the training batches of ``"stochastic"``.
        folder: the data folder; see :func:`pyroboost.data.data_folder`.

    Returns:
        The data set, rows of 784, with the 50 alphabets as labels from 0.

    Raises:
        DataError: the file is missing (it is not fetched: no checksum of it is established), or is
            not Omniglot.
        ValueError: an unknown binarisation, or more validation characters than there are.

    Reference:
        Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", 2016.
    """
    check_binarization("omniglot", binarization)
    path = local_file("omniglot", folder)
    held = read_mat(path, "data", "testdata", "target", "testtarget")
    images, labels = _characters(path, held["data"], held["target"])
    test, test_labels = _characters(path, held["testdata"], held["testtarget"])
    rows, held_out = seeded_split(
        len(images), (len(images) - validation, validation), seed, name="omniglot"
    )
    grey = Dataset(
        name="omniglot",
        train=images[rows],
        validation=images[held_out] if validation else None,
        test=test,
        image_shape=(28, 28),
        notes=f"validation: {validation:,} training characters by seed {seed}" * bool(validation),
        train_labels=labels[rows],
        validation_labels=labels[held_out] if validation else None,
        test_labels=test_labels,
    )
    return binarize(grey, binarization, seed=seed, batch_size=batch_size)


def digits(
    binarization: Binarization = "threshold",
    *,
    validation: int = 300,
    test: int = 300,
    seed: int = 0,
    batch_size: int = 100,
) -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, 8 x 8, ink 1; nothing is downloaded.

    Args:
        binarization: as for :func:`pyroboost.data.mnist`, of grey levels 0 to 16 over 16.
        validation: digits of the validation part; 0 for none.
        test: digits of the test part.
        seed: of the split, and of the held-out bits of ``"stochastic"``.
        batch_size: of the training batches of ``"stochastic"``.

    Returns:
        The data set, rows of 64.

    Raises:
        ValueError: an unknown binarisation, or parts larger than the whole.

    Example:
        >>> digits().train.shape, digits().notes
        (torch.Size([1197, 64]), 'bits: grey > 1/2; split by seed 0')
    """
    from sklearn.datasets import load_digits

    check_binarization("digits", binarization)
    pixels, tags = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.float32) / np.float32(16))
    labels = torch.from_numpy(tags.astype(np.int64))
    sizes = (len(images) - validation - test, validation, test)
    rows = seeded_split(len(images), sizes, seed, name="digits")
    grey = Dataset(
        name="digits",
        train=images[rows[0]],
        validation=images[rows[1]] if validation else None,
        test=images[rows[2]],
        image_shape=(8, 8),
        notes=f"split by seed {seed}",
        train_labels=labels[rows[0]],
        validation_labels=labels[rows[1]] if validation else None,
        test_labels=labels[rows[2]],
    )
    return binarize(grey, binarization, seed=seed, batch_size=batch_size)


def _parts(name: str, num: int, seed: int) -> list[Tensor]:
    return seeded_split(num, SIZES[name], seed, name=name)


def _upright(pixels: Array) -> Tensor:
    """Turn rows that hold 28 x 28 images column by column into rows that hold them by lines."""
    images = torch.from_numpy(np.ascontiguousarray(pixels).astype(np.float32))
    return images.view(-1, 28, 28).transpose(1, 2).reshape(-1, 784)


def _characters(path: Path, pixels: Array, target: Array) -> tuple[Tensor, Tensor]:
    num = pixels.shape[-1]
    grey = _shaped(pixels, (784, num), path, "data")
    if not (grey.size and grey.min() >= 0 and grey.max() <= 1):
        raise _unlike(path, "holds grey levels outside [0, 1]")
    alphabets = _shaped(target, (*target.shape[:1], num), path, "target")
    return _upright(grey.T), torch.from_numpy(alphabets.argmax(0).astype(np.int64))


def _shaped(values: Array, shape: tuple[int, ...], path: Path, name: str) -> Array:
    if values.shape != shape:
        raise _unlike(path, f"holds {name} of shape {values.shape} where {shape} belongs")
    return values


def _unlike(path: Path, problem: str) -> DataError:
    return DataError(f"{path} {problem}; put the public file in its place.")
