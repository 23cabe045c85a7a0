"""Expectation-maximisation of Gaussian mixtures: tensors in, tensors out.

One pass over the data, in chunks that fit the cache, does both steps. With the Cholesky factor
Sigma_k = L_k L_k^T, the whitened data y_k = L_k^{-1} (x - mu_k) of all components are *one*
matrix product of (1, x) with the stacked A_k = (-mu_k^T L_k^{-T}; L_k^{-T}); their squared norms
give the responsibilities r_k, and one more product accumulates (1, x)^T (r_k y_k), from which

    sum r_k y_k y_k^T = A_k^T sum (1, x)^T r_k y_k.

Since L_k is triangular, the left half of the columns needs only the left half of x in both
products, which saves a quarter of the work. The new moments are found *around the old component,
in its own units*, where they are close to 0 and 1: nothing cancels, and float32 data give
covariances good to float32. All algebra on the components, which is small, is done in float64.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Covariance = Literal["full", "diag"]
LOG_2PI = math.log(2.0 * math.pi)


class Mixture(NamedTuple):
    """Weights, locations and scales of a Gaussian mixture."""

    weights: Tensor  # (K,), summing to 1
    locs: Tensor  # (K, D)
    scale: Tensor  # (K, D) standard deviations, or (K, D, D) lower Cholesky factors

    @property
    def is_full(self) -> bool:
        """Whether the scales are Cholesky factors of full covariances."""
        return self.scale.dim() == 3

    def to(self, like: Tensor) -> "Mixture":
        """The same mixture in the dtype and on the device of a tensor."""
        return Mixture(*(part.to(like) for part in self))

    def shifted(self, offset: Tensor) -> "Mixture":  # offset: (D,)
        """The mixture of x + offset."""
        return self._replace(locs=self.locs + offset)


class Fit(NamedTuple):
    """What a run of EM gives back."""

    mixture: Mixture
    # Mean log-likelihood in nats before each step and after the last, then of the start where EM
    # ended below it; the final entry is the mixture's.
    history: list[float]
    converged: bool
    reseeded: int  # how many times an empty component was placed anew


class _Moments(NamedTuple):
    """The expectation step: the log-likelihood and the unconstrained new components."""

    log_density: float  # mean over the data
    counts: Tensor  # (K,), expected number of data
    locs: Tensor  # (K, D)
    covariance: Tensor  # (K, D) variances or (K, D, D)


def log_joint(x: Tensor, log_weights: Tensor, locs: Tensor, scale: Tensor) -> Tensor:
    """Log density of data and component, differentiable in everything.

    log w_k + log N(x; mu_k, Sigma_k)

    Args:
        x: data, (..., D).
        log_weights: normalised log weights, (K,).
        locs: locations, (K, D).
        scale: standard deviations (K, D), or lower Cholesky factors (K, D, D).

    Returns:
        (..., K), in nats.
    """
    if scale.dim() == 3:
        eye = torch.eye(locs.shape[-1], dtype=scale.dtype, device=scale.device)
        inverse = torch.linalg.solve_triangular(scale, eye.expand_as(scale), upper=False)
        shift = (inverse @ locs[:, :, None]).squeeze(-1)
        white = torch.tensordot(x, inverse, dims=([-1], [-1])) - shift  # (..., K, D)
        log_det = scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        white = (x.unsqueeze(-2) - locs) / scale
        log_det = scale.log().sum(-1)
    return log_weights - log_det - 0.5 * (white.square().sum(-1) + locs.shape[-1] * LOG_2PI)


def chunk_rows(data: Tensor, num_components: int) -> int:
    """Rows whose whitened copies for all components stay in cache (a GPU: in 256 MiB)."""
    budget = 2**28 if data.is_cuda else 2**22
    per_row = num_components * data.shape[1] * data.element_size()
    return max(256 if data.is_cuda else 64, budget // per_row)


def _whitening(mixture: Mixture) -> tuple[Tensor, list[tuple[int, int]]]:
    """A_k of all components, (K, 1 + D, D), and the column blocks to multiply by."""
    _, locs, tril = mixture
    d = locs.shape[1]
    eye = torch.eye(d, dtype=tril.dtype, device=tril.device).expand_as(tril)
    upper = torch.linalg.solve_triangular(tril, eye, upper=False).mT
    ends = [d // 2, d] if d >= 16 else [d]  # narrower blocks would waste more than they save
    cuts = list(zip([0, *ends], ends, strict=False))
    return torch.cat([-(locs[:, None] @ upper), upper], 1), cuts


def _from_sums(
    mean: float, counts: Tensor, sums: Tensor, stacked: Tensor, mixture: Mixture
) -> _Moments:
    """Moments in the data's units from sums = sum (1, x)^T r_k y_k, (K, 1 + D, D)."""
    divisor = counts.clamp_min(torch.finfo(counts.dtype).tiny)[:, None, None]
    step = sums[:, :1].mT / divisor  # (K, D, 1), in units of the old component
    second = (stacked.mT @ sums).triu() / divisor  # below the diagonal not all was summed
    inner = second + second.triu(1).mT - step @ step.mT
    tril = mixture.scale
    locs = mixture.locs + (tril @ step).squeeze(-1)
    return _Moments(mean, counts, locs, tril @ inner @ tril.mT)


def _full_moments(
    data: Tensor, centre: Tensor, mixture: Mixture, chunk: int, moments: bool
) -> _Moments:
    """Both steps for full covariances; see the module's first lines for the algebra."""
    weights, locs, tril = mixture
    k, d = locs.shape
    stacked, cuts = _whitening(mixture)
    blocks = [
        stacked[:, : 1 + hi, lo:hi].transpose(0, 1).reshape(1 + hi, -1).to(data.dtype)
        for lo, hi in cuts
    ]
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    offset = (weights.log() - log_det - 0.5 * d * LOG_2PI).to(data.dtype)
    total, counts = tril.new_zeros(()), tril.new_zeros(k)
    cross = [torch.zeros_like(block, dtype=tril.dtype) for block in blocks]
    augmented = data.new_ones(min(chunk, len(data)), 1 + d)
    buffers = [data.new_empty(len(augmented), block.shape[1]) for block in blocks]
    shift = centre.to(data.dtype)
    for rows in torch.split(data, chunk):
        n = len(rows)
        x = augmented[:n]
        torch.sub(rows, shift, out=x[:, 1:])
        whites = [
            torch.mm(x[:, : len(block)], block, out=buffer[:n]).view(n, k, -1)
            for block, buffer in zip(blocks, buffers, strict=True)
        ]
        squares = [torch.linalg.vector_norm(white, dim=-1).square_() for white in whites]
        logits = sum(squares[1:], start=squares[0]).mul_(-0.5).add_(offset)
        density = logits.logsumexp(-1, keepdim=True)
        total += density.sum(dtype=total.dtype)
        if moments:
            resp = logits.sub_(density).exp_()
            counts += resp.sum(0, dtype=counts.dtype)
            for found, white in zip(cross, whites, strict=True):
                white.mul_(resp[:, :, None])
                found += torch.mm(x[:, : len(found)].mT, white.view(n, -1))
    mean = float(total) / len(data)
    if not moments:
        return _Moments(mean, counts, locs, tril)
    sums = torch.zeros_like(stacked)
    for (lo, hi), found in zip(cuts, cross, strict=True):
        sums[:, : 1 + hi, lo:hi] = found.view(1 + hi, k, hi - lo).transpose(0, 1)
    return _from_sums(mean, counts, sums, stacked, mixture)


def _diag_moments(
    data: Tensor, centre: Tensor, mixture: Mixture, chunk: int, moments: bool
) -> _Moments:
    """Both steps for diagonal covariances, linear in (1, x, x^2) and always in float64."""
    weights, locs, scale = mixture
    k, d = locs.shape
    precision = scale.square().reciprocal()
    constant = weights.log() - scale.log().sum(-1) - 0.5 * d * LOG_2PI
    constant = constant - 0.5 * (locs.square() * precision).sum(-1)
    natural = torch.cat([constant[:, None], locs * precision, -0.5 * precision], 1).mT
    total, sums = scale.new_zeros(()), scale.new_zeros(k, 2 * d + 1)
    features = scale.new_ones(min(chunk, len(data)), 2 * d + 1)
    for rows in torch.split(data, chunk):
        n = len(rows)
        x = torch.sub(rows, centre, out=features[:n, 1 : d + 1])
        torch.square(x, out=features[:n, d + 1 :])
        logits = features[:n] @ natural
        density = logits.logsumexp(-1, keepdim=True)
        total += density.sum()
        if moments:
            sums.addmm_(logits.sub_(density).exp_().mT, features[:n])
    mean = float(total) / len(data)
    count = sums[:, 0]
    averages = sums / count.clamp_min(torch.finfo(count.dtype).tiny)[:, None]
    new_locs, squares = averages[:, 1 : d + 1], averages[:, d + 1 :]
    return _Moments(mean, count, new_locs, squares - new_locs.square())


def expectation(
    data: Tensor, centre: Tensor, mixture: Mixture, *, chunk: int | None, moments: bool
) -> _Moments:
    """One pass over the data: mean log-likelihood and, if wanted, the new moments.

    Args:
        data: (N, D), float32 or float64.
        centre: what is subtracted from the data before anything else, (D,), float64.
        mixture: in float64, its locations relative to `centre`.
        chunk: rows at a time; None chooses.
        moments: whether the new components are computed too.
    """
    rows = chunk or chunk_rows(data, len(mixture.weights))
    return (_full_moments if mixture.is_full else _diag_moments)(
        data, centre, mixture, rows, moments
    )


@torch.no_grad()
def mean_log_density(data: Tensor, mixture: Mixture, *, chunk: int | None = None) -> float:
    """Mean log-likelihood of data under a mixture, in nats per datum."""
    wide = mixture.to(mixture.locs.double())
    centre = wide.locs.mean(0)
    found = expectation(data, centre, wide.shifted(-centre), chunk=chunk, moments=False)
    return found.log_density


def floored_scale(covariance: Tensor, unit: Tensor, floor: float) -> Tensor:
    """The scale of the likeliest covariance whose variance is nowhere below the floor.

    Among all Sigma >= floor diag(unit^2) the maximiser of -log|Sigma| - tr(Sigma^{-1} S) has the
    eigenvectors of S (in units of `unit`) and its eigenvalues, cut off below at the floor. EM with
    this step stays monotone, which adding a constant to the diagonal does not guarantee.

    Args:
        covariance: S, (K, D, D) or variances (K, D), in float64.
        unit: standard deviation of each column, (D,).
        floor: least variance in these units.

    Returns:
        Lower Cholesky factors (K, D, D), or standard deviations (K, D).
    """
    if covariance.dim() == 2:
        return torch.maximum(covariance, floor * unit.square()).sqrt()
    scaled = covariance / (unit[:, None] * unit)
    scaled = 0.5 * (scaled + scaled.mT)
    eye = torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
    low = torch.linalg.cholesky_ex(scaled - floor * eye).info > 0
    if low.any():  # eigenvalues are dear, and hardly ever needed
        values, vectors = torch.linalg.eigh(scaled[low])
        scaled[low] = (vectors * values.clamp_min(floor)[:, None]) @ vectors.mT
    return unit[:, None] * torch.linalg.cholesky(scaled)
