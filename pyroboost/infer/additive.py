"""Additive boosting: grow a mixture part by part, each trained where the others are poor."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pyroboost.compose import Mixture
from pyroboost.compose._additive import Step
from pyroboost.infer._stage_fit import train_round
from pyroboost.infer.errors import check_composition, check_unweighted

__all__ = ["Added", "Addition", "additive"]


@dataclass(frozen=True)
class Addition(Step):
    """A round of additive boosting: what it did, the fit of its part, and the time it took."""

    fit: Any = field(repr=False, default=None)
    seconds: float = 0.0


@dataclass(frozen=True)
class Added:
    """A mixture grown by additive boosting and the reports of its rounds.

    Args:
        mixture: the mixture of the parts that were kept, which are those passed.
        rounds: one report per part that was trained.
    """

    mixture: Mixture
    rounds: tuple[Addition, ...]

    def table(self) -> str:
        """Return the reports as a table for people; log-likelihoods in nats per datum."""
        head = f"{'part':<12} {'weight':>7} {'m/q':>16} {'ESS':>8} {'beta':>6} "
        rows = [head + f"{'log-likelihood':>15} {'gain':>16} {'seconds':>8}  verdict"]
        for r in self.rounds:
            ratio = ""
            if r.slope is not None:
                ratio = f"{r.slope.ratio:.3g} ± {r.slope.ratio_error:.2g}"
            gain = "" if r.slope is None else f"{r.gain:.3f} ± {r.gain_error:.3f}"
            name = f"{r.index}: {r.name}"
            rows.append(
                f"{name:<12} {r.weight:>7.4f} {ratio:>16} {r.ess:>8.0f} {r.beta:>6.3f} "
                f"{r.after:>15.3f} {gain:>16} {r.seconds:>8.1f}  {r.verdict}"
            )
        last = self.rounds[-1]
        rows.append(f"{'held-out' if last.held_out else 'training'} log-likelihoods ({last.kind})")
        return "\n".join(rows)

    __str__ = table


def additive(
    mixture: Mixture,
    data: Tensor | tuple[Tensor, ...],
    *,
    validation: Any = None,
    start: int = 0,
    parts: Mapping[int, Mapping[str, Any]] | None = None,
    stop: bool = True,
    ess: float = 0.1,
    num_samples: int = 20,
    checkpoints: str | Path | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Added:
    r"""Train the parts of a mixture one after another, each on data that the others miss.

    The first part has the data as they are: $q_0 = m_0$. For t = 1, 2, ... part $m_t$ is trained
    on data weighted by $1 / q_{t-1}(x_n)$, and

    $$q_t = (1 - w)\, q_{t-1} + w\, m_t, \qquad
    w = \arg\max_{[0, 1]} \sum_n \log\big((1 - w)\, q_{t-1}(x_n) + w\, m_t(x_n)\big),$$

    the sum over held-out data where there are any. It is concave in w, and its derivative at
    $w = 0$ is the mean of $m_t / q_{t-1}$ less 1: where that is not above 0 by two standard
    errors, nor the gain itself, the part gains nothing and has weight 0.

    **Weights.** In many dimensions $1 / q$ leaves a handful of data. The weights are then
    $1 / q^\beta$ with the largest $\beta \le 1$ that leaves the effective sample size asked for;
    line search and test are those of the untempered mixture.

    **Estimates.** A part that does not know its density has it estimated by importance sampling.
    The logarithm of an estimate is low by half its relative variance, and the mean of $1 / \hat q$
    high by that variance; test, gain and likelihoods are corrected for both by the delta method,
    the line search is not, and mixes a little too much where the estimates are poor. What is
    reported is then an estimate, and training data flatter both.

    A part with an algorithm of its own (``own_fit``, such as EM) is fitted by it on data redrawn
    in proportion to their weights.

    Args:
        mixture: the mixture; its parts are trained in place, and its weights are set. A part that
            gains nothing stays trained in it, with weight 0.
        data: training data, N rows.  # (N, ...)
        validation: held-out data, likewise.
        start: first part to be trained; those before keep their values and, among themselves,
            their weights: ``additive(mixture + part, data, start=len(mixture))`` adds one part.
        parts: settings of :func:`fit` (or of the own algorithm) by part, over the common ones;
            ``{"method": "gradient"}`` trains a part that has its own algorithm by gradients.
        stop: stop after the first part that gains nothing.
        ess: least effective fraction of the data; 0 never tempers.
        num_samples: importance samples per datum, where densities are estimated.
        checkpoints: folder of one checkpoint per part; the same call resumes from it.
        seed: seed of all random streams, by part; ``None`` draws from the global generators.
        **settings: common settings of :func:`fit`: ``epochs``, ``batch_size``, ``lr``, ...

    Returns:
        The mixture of the parts that were kept, and a report per round.

    Raises:
        TypeError: the data are no tensors, or come with weights, or ``mixture`` is none.
        ValueError: an option is out of its range, or the first part gives a datum no density.

    Example:
        >>> import torch
        >>> from pyroboost.models import GMM
        >>> x = torch.cat([torch.randn(450, 1) - 4, torch.randn(50, 1) + 4])
        >>> grown = additive(Mixture(GMM(1, 1), GMM(1, 1)), x, seed=0)
        >>> [step.verdict for step in grown.rounds]
        ['base', 'grows']

    Reference:
        Rosset and Segal, Boosting density estimation (2002), section 2.
    """
    check_composition("additive", mixture, Mixture)
    options = dict(parts or {})
    check_unweighted("additive", settings, *options.values())
    if not set(options) <= set(range(len(mixture))):
        raise ValueError(
            f"additive: parts={sorted(options)} names a part that the mixture of {len(mixture)} "
            "does not have; count from 0."
        )
    growth = mixture.rounds(
        data,
        validation,
        start=start,
        stop=stop,
        ess=ess,
        num_samples=num_samples,
        seed=seed,
    )
    fits: list[tuple[Any, float]] = []
    for index, item in enumerate(growth, start=start):
        began = time.perf_counter()
        own = {**settings, **options.get(index, {})}
        stream = None if seed is None else seed + index
        result = train_round(index, item, own, checkpoints, stream)
        fits.append((result, time.perf_counter() - began))
    reports = tuple(
        Addition(**vars(step), fit=result, seconds=seconds)
        for step, (result, seconds) in zip(growth.steps, fits, strict=True)
    )
    return Added(mixture.kept(), reports)
