"""Bounds on, estimates of and exact values of log p(x), one per datum."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pyroboost.compose import Product
from pyroboost.contexts import service
from pyroboost.evaluation.weights import log_weights, row_blocks, take_rows
from pyroboost.likelihood import Kind, Likelihood, weakest
from pyroboost.metamodel import MetaModel
from pyroboost.sampling import log_mean_exp

__all__ = ["elbo", "importance_bound", "log_likelihood"]

_PARETO_DRAWS = 25
_SAMPLES = 200


def _kind(pair: MetaModel, kind: Kind) -> tuple[Kind, float]:
    constant, error = pair.normalisation()
    return weakest(kind, constant), error


def elbo(
    pair: MetaModel,
    x: Tensor,
    *args: Any,
    num_samples: int = 1,
    memory: float = 256.0,
    vectorized: bool = True,
) -> Likelihood:
    r"""Return the evidence lower bound of each datum.

    $$\mathcal{L}(x) = \mathbb{E}_{q(h \mid x)} \log \frac{m(x, h)}{q(h \mid x)} \le \log m(x)$$

    Args:
        pair: a meta-model.
        x: data.  # (N, ...)
        *args: further arguments of the pair.
        num_samples: samples per datum.
        memory: bound on the working memory, in MiB.
        vectorized: as in :func:`log_weights`.

    Returns:
        A bound in nats (an estimate where a log Z is estimated), with the Monte Carlo error of
        each datum from two samples on.

    Example:
        >>> import torch
        >>> from pyroboost.models import VAE
        >>> elbo(VAE(6, 2, units=8), torch.zeros(5, 6), num_samples=2).kind
        'bound'

    Reference:
        Cascaded meta-models, Theorem 1, for a composed pair.
    """
    table = log_weights(
        pair, x, *args, num_samples=num_samples, memory=memory, vectorized=vectorized
    )
    kind, shared = _kind(pair, "bound")
    error = table.std(0) / math.sqrt(num_samples) if num_samples > 1 else None
    return Likelihood(
        table.mean(0),
        kind,
        std_error=_with_shared(error, shared),
        num_samples=num_samples,
        shared_error=shared,
        doubt=_doubt(shared),
    )


def importance_bound(
    pair: MetaModel,
    x: Tensor,
    *args: Any,
    num_samples: int = 50,
    memory: float = 256.0,
    vectorized: bool = True,
) -> Likelihood:
    r"""Return the importance-weighted bound of each datum.

    $$\mathcal{L}_K(x) = \mathbb{E} \log \frac1K \sum_{k=1}^K w_k, \qquad
    \mathcal{L}_1 \le \mathcal{L}_K \le \log m(x)$$

    Args:
        pair: a meta-model.
        x: data.  # (N, ...)
        *args: further arguments of the pair.
        num_samples: importance samples K.
        memory: bound on the working memory, in MiB.
        vectorized: as in :func:`log_weights`.

    Returns:
        One draw of the bound per datum in nats, with delta-method errors, effective sample sizes
        and, from 25 samples on, Pareto k.

    Example:
        >>> import torch
        >>> from pyroboost.models import VAE
        >>> importance_bound(VAE(6, 2, units=8), torch.zeros(5, 6), num_samples=4).ess.shape
        torch.Size([5])

    Reference:
        Burda et al., Importance weighted autoencoders (2016), Eq. 8.
    """
    table = log_weights(
        pair, x, *args, num_samples=num_samples, memory=memory, vectorized=vectorized
    )
    kind, shared = _kind(pair, "bound")
    return _from_weights(table, kind, shared)


def _from_weights(table: Tensor, kind: Kind, shared: float) -> Likelihood:
    mean, error, ess = log_mean_exp(table)
    pareto_k = None
    if len(table) >= _PARETO_DRAWS:
        from pyroboost.sampling.psis import pareto_k as shape_of

        pareto_k = shape_of(table)
    return Likelihood(
        mean,
        kind,
        std_error=_with_shared(error if len(table) > 1 else None, shared),
        ess=ess,
        pareto_k=pareto_k,
        num_samples=len(table),
        shared_error=shared,
        doubt=_doubt(shared),
    )


def _with_shared(error: Tensor | None, shared: float) -> Tensor | None:
    """Add an error that all data share to those of the draws."""
    if error is None or shared == 0.0:
        return error
    return (error.square() + shared**2).sqrt()


def _doubt(shared: float) -> str | None:
    """Say why no error can be told, where a pair says so of its log Z."""
    return None if math.isfinite(shared) else "a log Z among its stages is not to be trusted"


def log_likelihood(
    pair: MetaModel,
    x: Tensor,
    *args: Any,
    num_samples: int | None = None,
    memory: float = 256.0,
    vectorized: bool = True,
) -> Likelihood:
    r"""Return log m(x) of each datum: exact where the pair knows it, else importance-sampled.

    $$\hat p(x) = \frac1S \sum_{s=1}^S \frac{m(x, h_s)}{q(h_s \mid x)}, \qquad
    \mathbb{E}\, \hat p(x) = m(x)$$

    The estimate is unbiased on the natural scale; its logarithm is low by about half its squared
    standard error, and unreliable where Pareto k exceeds 0.7.

    Args:
        pair: a meta-model.
        x: data.  # (N, ...)
        *args: further arguments of the pair.
        num_samples: importance samples S, where they are needed; 200 when left out, for a
            product the number that it was made with.
        memory: bound on the working memory, in MiB.
        vectorized: as in :func:`log_weights`.

    Returns:
        Log-likelihoods in nats that say what they are.

    Example:
        >>> import torch
        >>> from pyroboost.models import GMM, VAE
        >>> log_likelihood(GMM(3, 2), torch.zeros(5, 2)).kind
        'exact'
        >>> log_likelihood(VAE(6, 2, units=8), torch.zeros(5, 6), num_samples=3).kind
        'estimate'
    """
    known = _known(pair, x, args, num_samples, memory)
    if known is not None:
        return known
    table = log_weights(
        pair,
        x,
        *args,
        num_samples=_SAMPLES if num_samples is None else num_samples,
        memory=memory,
        vectorized=vectorized,
    )
    kind, shared = _kind(pair, "estimate")
    return _from_weights(table, kind, shared)


def _known(
    pair: MetaModel, x: Tensor, args: tuple[Any, ...], num_samples: int | None, memory: float
) -> Likelihood | None:
    """Ask the pair itself, in blocks of data."""
    if isinstance(pair, Product):  # it splits data itself, and nothing could be run for a measure
        return pair.log_marginal(x, *args, num_samples=num_samples, memory=memory)
    with service(pair):
        first = pair.log_marginal(x[:1], *take_rows(args, slice(0, 1), len(x)))
        if first is None:
            return None
        parts = [
            pair.log_marginal(*take_rows((x, *args), rows, len(x)))
            for rows, _ in row_blocks(pair, x, args, 1, memory)
        ]
    return Likelihood.cat([part for part in parts if part is not None])
