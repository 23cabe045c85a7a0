"""CelebA from the user's own copy, read batch by batch."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyroboost.data.batches import ImageBatches
from pyroboost.data.dataset import Dataset
from pyroboost.data.files import DataError, data_folder
from pyroboost.data.splits import seeded_split

__all__ = ["celeba"]


def celeba(
    folder: str | os.PathLike[str] | None = None,
    *,
    size: int = 64,
    batch_size: int = 100,
    seed: int = 0,
) -> Dataset:
    """Return the aligned faces of CelebA, grey levels in [0, 1], 3 x ``size`` x ``size``.

    The pictures must be the user's own copy, in CelebA's layout: ``img_align_celeba/*.jpg`` and,
    for the official split, ``list_eval_partition.txt``; without that list the split is 80 / 10 /
    10 % of a seeded order, and ``notes`` says so. From each picture the largest central square is
    cut and shrunk. Files are read when a batch is needed, so nothing has to fit in memory;
    validation and test keep the order of the names.

    Args:
        folder: the folder with ``img_align_celeba``; by default ``celeba`` in the data folder.
        size: height and width in pixels.
        batch_size: pictures of a batch.
        seed: of the split without a list.

    Returns:
        The data set, each part an :class:`~pyroboost.data.ImageBatches`.

    Raises:
        DataError: no pictures, a list that does not fit them, or (while reading) a damaged one.
        ValueError: a size below 1.

    Reference:
        Liu, Luo, Wang and Tang, "Deep learning face attributes in the wild", 2015.
    """
    if size < 1:
        raise ValueError(f"celeba: size is {size}; take 1 or more.")
    root = data_folder() / "celeba" if folder is None else Path(folder).expanduser()
    paths = sorted((root / "img_align_celeba").glob("*.jpg"))
    if len(paths) < 3:
        raise DataError(
            f"celeba: {root / 'img_align_celeba'} holds {len(paths)} jpg files; get CelebA from "
            "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put the aligned pictures there."
        )
    listed = root / "list_eval_partition.txt"
    if listed.is_file():
        parts, notes = _listed(listed, paths), "official split"
    else:
        tenth = max(1, len(paths) // 10)
        rows = seeded_split(len(paths), (len(paths) - 2 * tenth, tenth, tenth), seed, name="celeba")
        parts = [[paths[row] for row in part.sort().values.tolist()] for part in rows]
        notes = f"seeded split (seed {seed}), not the official one"
    read = partial(_read, size=size)
    train = ImageBatches(parts[0], read, batch_size)
    validation, test = (ImageBatches(p, read, batch_size, shuffle=False) for p in parts[1:])
    return Dataset("celeba", train, validation, test, image_shape=(3, size, size), notes=notes)


def _listed(listed: Path, paths: list[Path]) -> list[list[Path]]:
    lines = [line.split() for line in listed.read_text(errors="replace").splitlines()]
    if not all(len(line) == 2 and line[1] in {"0", "1", "2"} for line in lines if line):
        raise DataError(
            f"celeba: {listed} has lines that are not a file name and 0, 1 or 2; put the public "
            "list in its place, or remove it for a seeded split."
        )
    part_of = {line[0]: int(line[1]) for line in lines if line}
    parts: list[list[Path]] = [[], [], []]
    for path in paths:
        if path.name in part_of:
            parts[part_of[path.name]].append(path)
    if not all(parts):
        sizes = ", ".join(str(len(part)) for part in parts)
        raise DataError(
            f"celeba: by {listed} the pictures present fall into parts of {sizes}; add pictures of "
            "every part, or remove the list for a seeded split."
        )
    return parts


def _read(path: Path, size: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            width, height = picture.size
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            square = picture.convert("RGB").crop((left, top, left + side, top + side))
            shrunk = square.resize((size, size), Image.Resampling.BOX)
    except (OSError, SyntaxError) as error:  # what Pillow raises on damaged files
        raise DataError(
            f"celeba: {path} is not a readable picture ({type(error).__name__}); replace or remove "
            "it."
        ) from error
    pixels = np.asarray(shrunk, dtype=np.float32) / np.float32(255)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
