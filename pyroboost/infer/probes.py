"""Cheap density models of a hidden variable: what would one more stage gain?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyroboost.metamodel import MetaModel

__all__ = ["probe_gain"]

_COMPONENTS = 5


def probe_gain(stage: MetaModel, fitted: Tensor, judged: Tensor) -> tuple[float, float]:
    r"""Return what a cheap stage above would add to the bound, judged on held-out values.

    $$\mathbb{E}_q [\log \hat p(h_k) - \log m_k(h_k)]$$

    The probe is a mixture of the stage's own prior with a mixture of five full normals (continuous
    values), of five products of Bernoullis (bits) or with smoothed frequencies (an index), so that
    it can find what is there and cannot lose more than the log of its weight on the prior.

    Args:
        stage: the stage whose hidden variable is probed.
        fitted: hidden values to which the probe is fitted.  # (N, ...)
        judged: hidden values on which it is judged.  # (M, ...)

    Returns:
        The gain and its standard error, in nats.
    """
    prior = stage.log_prior(judged).value.double()
    base = stage.log_prior(fitted).value.double()
    alternative = _alternative(fitted, judged)
    # The weight of the alternative is chosen on the fitted data, where its density is known too.
    best, weight = -math.inf, 0.0
    half = len(fitted) // 2
    trial = _alternative(fitted[:half], fitted[half:])
    for candidate in (0.0, 0.01, 0.1, 0.5, 0.9, 0.99):
        score = float(_mix(base[half:], trial, candidate).mean())
        if score > best:
            best, weight = score, candidate
    gain = _mix(prior, alternative, weight) - prior
    return float(gain.mean()), float(gain.std()) / math.sqrt(len(gain)) + 1e-9


def _mix(prior: Tensor, alternative: Tensor, weight: float) -> Tensor:
    if weight == 0.0:
        return prior
    return torch.logaddexp(math.log1p(-weight) + prior, math.log(weight) + alternative)


def _alternative(fitted: Tensor, judged: Tensor) -> Tensor:
    """Return the log density of the judged values under a model of the fitted ones."""
    if not fitted.is_floating_point():
        return _frequencies(fitted, judged)
    a, b = fitted.reshape(len(fitted), -1).double(), judged.reshape(len(judged), -1).double()
    if bool(((a == 0) | (a == 1)).all()):
        return _bernoulli_mixture(a, b)
    from sklearn.mixture import GaussianMixture

    components = max(1, min(_COMPONENTS, len(a) // (2 * a.shape[1] + 2)))
    seed = int(torch.randint(2**31 - 1, ()))
    model = GaussianMixture(components, reg_covar=1e-4, n_init=2, random_state=seed)
    model.fit(a.cpu().numpy())
    return torch.as_tensor(model.score_samples(b.cpu().numpy()), device=b.device)


def _frequencies(fitted: Tensor, judged: Tensor) -> Tensor:
    a, b = fitted.reshape(len(fitted), -1).long(), judged.reshape(len(judged), -1).long()
    width = int(torch.cat([a, b]).max()) + 1
    counts = torch.nn.functional.one_hot(a, width).sum(0).double() + 0.5
    table = (counts / counts.sum(-1, keepdim=True)).log()
    columns = torch.arange(a.shape[1], device=b.device)
    return table[columns, b].sum(-1)


def _bernoulli_mixture(fitted: Tensor, judged: Tensor, iterations: int = 30) -> Tensor:
    """Fit a mixture of products of Bernoullis by EM and score other values."""
    count = max(1, min(_COMPONENTS, len(fitted) // 20))
    rows = torch.randperm(len(fitted), device=fitted.device)[:count]
    means = 0.25 + 0.5 * fitted[rows]
    weights = fitted.new_full((count,), 1 / count)

    def joint(x: Tensor) -> Tensor:
        return x @ means.log().T + (1 - x) @ (-means).log1p().T + weights.log()

    for _ in range(iterations):
        resp = joint(fitted).softmax(-1)
        mass = resp.sum(0) + 1e-9
        means = (resp.T @ fitted + 0.5) / (mass[:, None] + 1.0)
        weights = mass / mass.sum()
    return joint(judged).logsumexp(-1)
