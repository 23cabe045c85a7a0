"""Has a cascade converged? A probe stage, active units, a two-sample test, a necessary sign."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroboost.contexts import forked_rng
from pyroboost.infer.probes import probe_gain
from pyroboost.metamodel import MetaModel

__all__ = ["Convergence", "check_convergence"]

_ACTIVE = 0.01
_LEVEL = 0.01


@dataclass(frozen=True)
class Convergence:
    r"""Whether the bound can still grow above a stage, and the evidence.

    Args:
        sign: $\mathbb{E}_q \log m_k(h_k) - \mathbb{E}_{m_k} \log m_k(h_k)$ in nats: zero at the
            best global optimum. It is necessary only: it also holds for any mixture after an EM
            step and for a collapsed auto-encoder.
        sign_error: its standard error.
        gain: what a cheap probe stage on top would add to the held-out bound, in nats.
        gain_error: its standard error.
        active: fraction of hidden units whose posterior mean moves with the data.
        test_p: p-value of a two-sample test of the stage's own data against its draws.
    """

    sign: float
    sign_error: float
    gain: float
    gain_error: float
    active: float
    test_p: float

    @property
    def sign_fails(self) -> bool:
        """Whether the necessary sign is off by more than two standard errors."""
        return abs(self.sign) > 2 * self.sign_error

    @property
    def converged(self) -> bool:
        """Whether every piece of evidence says that nothing above can help."""
        return (
            not self.sign_fails
            and self.gain <= 2 * self.gain_error
            and self.active > 0
            and self.test_p >= _LEVEL
        )

    def describe(self) -> str:
        """Return the verdict in words, with its reason."""
        if self.sign_fails:
            return f"not converged (sign {self.sign:.3g} ± {self.sign_error:.2g} nats)"
        if self.gain > 2 * self.gain_error:
            return f"not converged (a probe gains {self.gain:.3g} ± {self.gain_error:.2g} nats)"
        if self.active == 0:
            return "undecided (no hidden unit is active)"
        if self.test_p < _LEVEL:
            return f"not converged (its draws differ from its data, p = {self.test_p:.2g})"
        return "converged (a probe gains nothing, units are active, draws match)"


def check_convergence(
    stage: MetaModel,
    data: Tensor,
    *,
    held_out: Tensor | None = None,
    draws: int = 8,
    seed: int = 0,
) -> Convergence:
    r"""Look for signs that nothing above a trained stage can raise the bound.

    Args:
        stage: the top stage, $m_k$.
        data: values of its visible variable that it was trained on.  # (N, ...)
        held_out: others, on which gain and test are judged; half of ``data`` when left out.
        draws: posterior draws per datum for the activity of units.
        seed: seed of this check's own random stream.

    Returns:
        The evidence; :attr:`Convergence.converged` sums it up.

    Raises:
        ValueError: fewer than 20 data.

    Reference:
        Cascaded meta-models, section 2.5, Theorems 2 and 3.
    """
    if len(data) < 20:
        raise ValueError(f"check_convergence: {len(data)} data came; pass at least 20.")
    if held_out is None:
        half = len(data) // 2
        data, held_out = data[:half], data[half:]
    with forked_rng(seed):
        fitted, judged = stage.encode(data), stage.encode(held_out)
        own = stage.sample(torch.zeros_like(held_out))
        prior = stage.sample_hidden(torch.zeros_like(held_out))
        sign, sign_error = _sign(stage, judged, prior)
        gain, gain_error = probe_gain(stage, fitted, judged)
        return Convergence(
            sign=sign,
            sign_error=sign_error,
            gain=gain,
            gain_error=gain_error,
            active=_active(stage, held_out, draws),
            test_p=two_sample_p(held_out, own),
        )


def _sign(stage: MetaModel, inferred: Tensor, prior: Tensor) -> tuple[float, float]:
    """Return Theorem 3's difference and its standard error."""
    left = stage.log_prior(inferred).value.double()
    right = stage.log_prior(prior).value.double()
    error = math.sqrt(float(left.var()) / len(left) + float(right.var()) / len(right))
    # A prior of equal probabilities has no spread and no difference but rounding.
    return float(left.mean() - right.mean()), error + 1e-6


def _active(stage: MetaModel, data: Tensor, draws: int) -> float:
    """Return the fraction of units with Var_x E[h | x] above 0.01, noise of the draws removed."""
    drawn = torch.cat([stage.encode(data) for _ in range(draws)])
    values = _numbers(drawn).reshape(draws, len(data), -1)
    within = values.var(0).mean(0) / draws
    between = values.mean(0).var(0)
    threshold = _ACTIVE + 4 * within * math.sqrt(2 / len(data))
    return float((between - within > threshold).double().mean())


def _numbers(h: Tensor) -> Tensor:
    """Lay values out as vectors; a component index becomes indicators."""
    if h.is_floating_point():
        return h.reshape(len(h), -1)
    flat = h.reshape(len(h), -1).long()
    width = int(flat.max()) + 1
    return torch.nn.functional.one_hot(flat, max(width, 2)).reshape(len(h), -1).float()


def two_sample_p(first: Tensor, second: Tensor) -> float:
    """Test whether two samples come from one law, by a classifier that tries to tell them apart.

    Each half of the data trains a gradient-boosted classifier whose scores on the other half are
    compared by rank; the smaller of the two p-values is doubled.

    Args:
        first: a sample.  # (N, ...)
        second: another one.  # (M, ...)

    Returns:
        p-value: small where the samples differ.

    Reference:
        Lopez-Paz and Oquab, Revisiting classifier two-sample tests (2017).
    """
    from scipy.stats import mannwhitneyu
    from sklearn.ensemble import HistGradientBoostingClassifier

    size = min(len(first), len(second))
    both = _numbers(torch.cat([first[:size], second[:size]])).cpu().double().numpy()
    labels = torch.arange(2 * size).ge(size).numpy()
    halves = torch.randperm(2 * size).numpy().reshape(2, -1)
    p_values = []
    for train, test in (halves, halves[::-1]):
        seed = int(torch.randint(2**31 - 1, ()))
        model = HistGradientBoostingClassifier(max_iter=50, max_depth=3, random_state=seed)
        scores = model.fit(both[train], labels[train]).decision_function(both[test])
        own = labels[test]
        p_values.append(mannwhitneyu(scores[own], scores[~own], alternative="greater").pvalue)
    return min(1.0, 2 * float(min(p_values)))
