"""Tea: every way to share a pot of tea among five cups."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from pyroboost.data.conventions import SIZES
from pyroboost.data.dataset import Dataset
from pyroboost.data.splits import seeded_split

__all__ = ["TEA_LOG_LIKELIHOOD", "tea", "tea_images"]

TEA_LOG_LIKELIHOOD = -math.log(243)
"""Log-likelihood of a Tea image under the perfect model, log(1/243) = -5.49 nats."""


def tea_images() -> Tensor:
    r"""Return all 243 images of Tea.

    The left half of the 10 x 10 image is a pot of ten lines of five pixels; the right half five
    cups, one below another, of two lines of five pixels. Liquid (ones) fills whole lines from the
    bottom of each vessel. Cup c holds $l_c \in \{0, 1, 2\}$ lines and the pot the other
    $10 - \sum_c l_c$, so that every image has 50 ones and there are $3^5 = 243$ of them.

    Returns:
        The images, in the order of $(l_1, ..., l_5)$ counted up from zero.  # (243, 100)

    Example:
        >>> images = tea_images()
        >>> images.shape, images.sum(1).unique()
        (torch.Size([243, 100]), tensor([50.]))

    Reference:
        Arnold and Ollivier, "Layer-wise learning of deep generative models", 2012, section 3.1.
    """
    images = torch.zeros(243, 10, 10)
    for image, levels in zip(images, itertools.product(range(3), repeat=5), strict=True):
        image[sum(levels) :, :5] = 1.0
        for cup, level in enumerate(levels):
            bottom = 2 * (cup + 1)
            image[bottom - level : bottom, 5:] = 1.0
    return images.view(243, 100)


def tea(*, seed: int = 0) -> Dataset:
    """Return Tea, split into 81 / 81 / 81 images by a seed.

    Args:
        seed: of the split.

    Returns:
        The data set, rows of 100 bits.

    Example:
        >>> tea(seed=1).test.shape
        torch.Size([81, 100])

    Reference:
        Arnold and Ollivier, "Layer-wise learning of deep generative models", 2012, section 3.1.
    """
    images = tea_images()
    parts = seeded_split(len(images), SIZES["tea"], seed, name="tea")
    train, validation, test = (images[rows] for rows in parts)
    notes = f"all 243 images, split by seed {seed}"
    return Dataset("tea", train, validation, test, image_shape=(10, 10), notes=notes)
