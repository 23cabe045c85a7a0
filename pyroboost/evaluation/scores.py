"""How good predicted probabilities of classes are: accuracy, calibration, Brier score."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accuracy", "brier_score", "expected_calibration_error"]


def _check(where: str, probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities in double precision beside their labels, or say what is wrong."""
    if probabilities.dim() != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"{where}: probabilities of shape {tuple(probabilities.shape)} and labels of shape "
            f"{tuple(labels.shape)}; pass (N, C) and (N,) with at least one datum."
        )
    p = probabilities.detach().double()
    if not bool((p >= 0).all()) or not bool(((p.sum(-1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            f"{where}: a row of probabilities is negative, NaN or does not sum to one; pass "
            "probabilities, not logits."
        )
    if labels.is_floating_point() or not bool(((labels >= 0) & (labels < p.shape[1])).all()):
        raise ValueError(
            f"{where}: labels must be class numbers from 0 to {p.shape[1] - 1}; leave out rows "
            "whose label is missing."
        )
    return p, labels.long().to(p.device)


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Return the share of data whose most probable class is their own.

    Args:
        probabilities: predicted probabilities.  # (N, C)
        labels: true class numbers.  # (N,)

    Raises:
        ValueError: shapes, probabilities or labels are of no use.

    Example:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        0.5
    """
    p, y = _check("accuracy", probabilities, labels)
    return float((p.argmax(-1) == y).double().mean())


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    r"""Return the mean squared distance of predicted probabilities from the truth.

    $$\frac1N \sum_n \sum_c (p_{nc} - 1[y_n = c])^2$$

    It lies between 0 and 2, and for two classes is twice the square of one probability's error.

    Args:
        probabilities: predicted probabilities.  # (N, C)
        labels: true class numbers.  # (N,)

    Raises:
        ValueError: shapes, probabilities or labels are of no use.

    Example:
        >>> round(brier_score(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1])), 4)
        0.37

    Reference:
        Brier, Verification of forecasts expressed in terms of probability (1950), Eq. 2.
    """
    p, y = _check("brier_score", probabilities, labels)
    truth = torch.nn.functional.one_hot(y, p.shape[1])
    return float((p - truth).square().sum(-1).mean())


def expected_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    r"""Return by how much confidence and accuracy differ, averaged over bins of confidence.

    $$\sum_b \frac{|B_b|}{N} \Big| \mathrm{acc}(B_b) - \mathrm{conf}(B_b) \Big|$$

    Confidence is the largest probability of a row; bins divide [0, 1] into equal parts, open on
    the left. The estimate is biased upwards by sampling error, more so with more bins.

    Args:
        probabilities: predicted probabilities.  # (N, C)
        labels: true class numbers.  # (N,)
        num_bins: number of bins.

    Raises:
        ValueError: shapes, probabilities or labels are of no use, or there is no bin.

    Example:
        >>> p = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
        >>> round(expected_calibration_error(p, torch.tensor([0, 1])), 4)
        0.3

    Reference:
        Naeini et al., Obtaining well calibrated probabilities using Bayesian binning (2015); Guo
        et al., On calibration of modern neural networks (2017), Eq. 3.
    """
    p, y = _check("expected_calibration_error", probabilities, labels)
    if num_bins < 1:
        raise ValueError(f"expected_calibration_error: num_bins is {num_bins}; take 1 or more.")
    confidence, guess = p.max(-1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=p.dtype, device=p.device)
    place = torch.bucketize(confidence, edges[1:-1])
    error = (guess == y).double() - confidence
    sums = torch.zeros(num_bins, dtype=p.dtype, device=p.device).index_add(0, place, error)
    return float(sums.abs().sum() / len(y))
