"""Whether two sets of draws come from one law: sliced Wasserstein distance, classifier test."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Distance", "TwoSample", "classifier_test", "distance", "sliced_wasserstein"]

_MOST = 2000  # draws of each set that a classifier sees
_BLOCKS = 20  # consecutive draws stay together when a reference is split


def sliced_wasserstein(first: Tensor, second: Tensor, *, num_projections: int = 200) -> float:
    r"""Measure how far apart two sets of draws are, averaged over directions.

    $$\mathrm{SW}_2^2 = \mathbb{E}_u\, W_2^2(u^\top a, u^\top b), \qquad
    W_2^2 = \int_0^1 \bigl(F_a^{-1}(t) - F_b^{-1}(t)\bigr)^2 dt$$

    It is in the units of the draws: standardise them first. It is never zero for finite draws, not
    even from one law.

    Args:
        first: draws.  # (S, D)
        second: draws.  # (R, D)
        num_projections: directions u, uniform on the sphere; one is enough where D is 1.

    Returns:
        The distance.

    Raises:
        ValueError: the draws do not have one number of columns, or are not finite.

    Example:
        >>> a = torch.randn(500, 3)
        >>> round(sliced_wasserstein(a, a + torch.tensor([3.0**0.5, 0.0, 0.0])), 0)
        1.0

    Reference:
        Bonneel, Rabin, Peyre and Pfister, Sliced and Radon Wasserstein barycenters (2015).
    """
    first, second = _pair("sliced_wasserstein", first, second)
    size = first.shape[1]
    u = torch.randn(size, num_projections if size > 1 else 1, dtype=torch.float64)
    u = u / u.norm(dim=0)
    a, b = ((draws @ u).sort(0).values for draws in (first, second))
    count = max(len(a), len(b))
    at = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    a, b = (draws[(at * len(draws)).long()] for draws in (a, b))
    return math.sqrt(float((a - b).square().mean()))


@dataclass(frozen=True)
class Distance:
    """A sliced Wasserstein distance beside the distance that noise alone makes.

    Args:
        value: distance of draws to half of the reference, the mean over splits.
        null: distance of the other half to that half, likewise.
        null_largest: the largest such distance over the splits.
        num_draws: draws on each side.
    """

    value: float
    null: float
    null_largest: float
    num_draws: int

    def __str__(self) -> str:
        return f"{self.value:.3f} (halves of the reference: {self.null:.3f})"


def distance(
    draws: Tensor, reference: Tensor, *, num_projections: int = 200, splits: int = 10
) -> Distance:
    """Measure draws against a reference, (R, D) in the order of its chains, split at random.

    Consecutive draws of the reference stay together, so that the null level holds the error of
    chains that mix slowly.
    """
    blocks = torch.arange(len(reference)).tensor_split(min(_BLOCKS, len(reference)))
    values, nulls, size = [], [], min(len(draws), len(reference) // 2)
    for _ in range(splits):
        order = torch.randperm(len(blocks)).tolist()
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        near, far = (torch.cat([blocks[i] for i in half]) for half in halves)
        size = min(size, len(near), len(far))
        near, far = reference[_some(near, size)], reference[_some(far, size)]
        mine = draws[_some(torch.arange(len(draws)), size)]
        values.append(sliced_wasserstein(mine, near, num_projections=num_projections))
        nulls.append(sliced_wasserstein(far, near, num_projections=num_projections))
    return Distance(sum(values) / splits, sum(nulls) / splits, max(nulls), size)


def _some(index: Tensor, size: int) -> Tensor:
    return index[torch.randperm(len(index))[:size]]


@dataclass(frozen=True)
class TwoSample:
    """How well a classifier tells two sets of draws apart.

    Args:
        accuracy: share of held-out draws that it puts into their own set; 0.5 by chance.
        auc: area under the ROC curve of held-out draws, the mean of two folds; 0.5 by chance.
        p_value: of the AUC under the hypothesis of one law, one-sided and never too small.
        num_draws: draws of each set.
    """

    accuracy: float
    auc: float
    p_value: float
    num_draws: int

    def __str__(self) -> str:
        return f"AUC {self.auc:.3f}, accuracy {self.accuracy:.3f}, p = {self.p_value:.2g}"


def classifier_test(first: Tensor, second: Tensor, *, classifier: Any = None) -> TwoSample:
    r"""Test whether two sets of independent draws come from one law by telling them apart.

    Half of the draws train a classifier, the others are ranked by it, and the halves change
    places. Given the classifier, the labels of held-out draws are exchangeable under the
    hypothesis, so that the Mann-Whitney test of their ranks (by its normal limit) holds in each
    fold; the folds are not independent, and $p = \min(1, 2 \min(p_1, p_2))$ is right whatever
    they share.

    Args:
        first: draws.  # (S, D)
        second: draws.  # (R, D)
        classifier: a scikit-learn classifier with ``predict_proba``; 200 extremely randomised
            trees when left out.

    Returns:
        Held-out accuracy, AUC and p-value; of each set 2,000 draws at most are used.

    Raises:
        ValueError: fewer than 20 draws in a set, or draws of no use.

    Example:
        >>> found = classifier_test(torch.randn(200, 2), torch.randn(200, 2) + 3.0)
        >>> found.auc > 0.9, found.p_value < 1e-6
        (True, True)

    Reference:
        Lopez-Paz and Oquab, Revisiting classifier two-sample tests (2017), section 3.
    """
    import numpy as np
    from scipy.stats import mannwhitneyu
    from sklearn.base import clone
    from sklearn.ensemble import ExtraTreesClassifier

    first, second = _pair("classifier_test", first, second)
    count = min(len(first), len(second), _MOST) // 2 * 2
    if count < 20:
        raise ValueError(
            f"classifier_test: {len(first)} and {len(second)} draws are too few; pass at least 20 "
            "of each."
        )
    if classifier is None:
        seed = int(torch.randint(2**31 - 1, ()))
        classifier = ExtraTreesClassifier(200, min_samples_leaf=5, random_state=seed)
    # Every draw of each set comes to one fold, as many from either set.
    table = [draws[torch.randperm(len(draws))[:count]].numpy() for draws in (first, second)]
    half, labels = count // 2, np.repeat([0, 1], count // 2)
    folds = [np.concatenate([t[:half] for t in table]), np.concatenate([t[half:] for t in table])]
    hits, areas, p_values = [], [], []
    for train, test in (folds, folds[::-1]):
        score = clone(classifier).fit(train, labels).predict_proba(test)[:, 1]
        rank = mannwhitneyu(score[labels == 1], score[labels == 0], alternative="greater")
        areas.append(float(rank.statistic) / half**2)
        p_values.append(float(rank.pvalue))
        hits.append(float(((score > 0.5) == (labels == 1)).mean()))
    return TwoSample(sum(hits) / 2, sum(areas) / 2, min(1.0, 2 * min(p_values)), count)


def _pair(where: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"{where}: draws of shapes {shapes}; pass (S, D) and (R, D).")
    if not first.numel() or not second.numel():
        raise ValueError(f"{where}: there is nothing in draws of shapes {shapes}.")
    found = [draws.detach().to("cpu", torch.float64) for draws in (first, second)]
    if not all(bool(draws.isfinite().all()) for draws in found):
        raise ValueError(f"{where}: a draw is NaN or infinite; check what produced it.")
    return found[0], found[1]
