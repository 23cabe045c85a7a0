"""Starts for the EM of Gaussian mixtures, and the loop that improves them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pyroboost.models._em import (
    Covariance,
    Fit,
    Mixture,
    chunk_rows,
    expectation,
    floored_scale,
)

EMPTY = 1e-3  # a component that explains less than a thousandth of one datum is empty
RESEED_WEIGHT = 0.01  # of all the components; log(1 - 0.01) bounds what placing one anew costs


def centre_and_unit(data: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, float64; constant columns get a usual unit."""
    total = data.new_zeros(data.shape[1], dtype=torch.float64)
    for rows in torch.split(data, 65536):
        total += rows.sum(0, dtype=torch.float64)
    centre = total / len(data)
    squares, largest = torch.zeros_like(centre), torch.zeros_like(centre)
    for rows in torch.split(data, 65536):
        squares += (rows - centre).square().sum(0)
        largest = torch.maximum(largest, rows.abs().amax(0).double())
    unit = (squares / len(data)).sqrt()
    constant = unit <= 4.0 * torch.finfo(data.dtype).eps * largest  # nothing but rounding
    usual = unit[~constant].mean() if (~constant).any() else torch.ones_like(unit[0])
    return centre, torch.where(constant, usual, unit)


def _draw(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Indices in proportion to weights (uniform if all are 0), for any number of them."""
    device = weights.device if generator is None else generator.device
    uniform = torch.rand(count, dtype=torch.float64, generator=generator, device=device)
    edges = weights.double().cumsum(0)
    if edges[-1] <= 0:
        edges = torch.arange(1, len(weights) + 1, dtype=torch.float64, device=weights.device)
    found = torch.searchsorted(edges, uniform.to(edges.device) * edges[-1], right=True)
    return found.clamp_max(len(weights) - 1)


def _standard_chunks(data: Tensor, centre: Tensor, unit: Tensor, chunk: int) -> Iterator[Tensor]:
    for rows in torch.split(data, chunk):
        yield ((rows - centre) / unit).to(data.dtype)


def _seed(
    data: Tensor, k: int, centre: Tensor, unit: Tensor, generator: torch.Generator | None
) -> Tensor:
    """k-means++: each centre the best of a few data drawn in proportion to squared distance."""
    tries = 2 + int(math.log(k))
    chunk = chunk_rows(data, tries)
    nearest = data.new_full((len(data),), math.inf)
    chosen: list[Tensor] = []
    for _ in range(k):
        mass = nearest if chosen else torch.zeros_like(nearest)
        index = _draw(mass, tries, generator)
        candidates = ((data[index] - centre) / unit).to(data.dtype)
        distance = torch.cat(
            [
                torch.cdist(rows, candidates).square_()
                for rows in _standard_chunks(data, centre, unit, chunk)
            ]
        )
        best = torch.minimum(distance, nearest[:, None])
        winner = int(best.sum(0, dtype=torch.float64).argmin())
        nearest = best[:, winner].contiguous()
        chosen.append(candidates[winner])
    return torch.stack(chosen)


def kmeans_start(
    data: Tensor,
    num_components: int,
    *,
    covariance: Covariance = "full",
    variance_floor: float = 1e-6,
    lloyd_steps: int = 5,
    generator: torch.Generator | None = None,
) -> Mixture:
    """A mixture around k-means++ centres, improved by a few of Lloyd's steps.

    All components share the covariance within clusters (total less between), which is well
    determined even where single clusters hold a few data; columns count in units of their
    standard deviation. An empty cluster keeps its centre.

    Args:
        data: (N, D), float32 or float64.
        num_components: K.
        covariance: "full" or "diag".
        variance_floor: least variance, in units of each column's variance.
        lloyd_steps: assignments to the nearest centre followed by averaging; at least 1.
        generator: source of randomness; None is torch's global one.

    Returns:
        A float64 mixture.

    Reference:
        Arthur and Vassilvitskii (2007), "k-means++: the advantages of careful seeding".
    """
    centre, unit = centre_and_unit(data)
    means = _seed(data, num_components, centre, unit, generator).double()
    chunk = chunk_rows(data, num_components)
    count = means.new_zeros(num_components)
    for _ in range(max(1, lloyd_steps)):
        count, sums = torch.zeros_like(count), torch.zeros_like(means)
        for rows in _standard_chunks(data, centre, unit, chunk):
            label = torch.cdist(rows, means.to(rows)).argmin(1)
            count += torch.bincount(label, minlength=num_components)
            sums.index_add_(0, label, rows.double())
        means = torch.where(count[:, None] > 0, sums / count.clamp_min(1)[:, None], means)
    weights = (count + 1.0) / (count + 1.0).sum()
    d = data.shape[1]
    total = means.new_zeros(d, d)
    for rows in _standard_chunks(data, centre, unit, chunk):
        total += rows.mT.double() @ rows.double()
    within = (total - (count[:, None] * means).mT @ means) / len(data)
    within = within * unit[:, None] * unit
    if covariance == "diag":
        within = within.diagonal()
    scale = floored_scale(within[None], unit, variance_floor)
    locs = means * unit + centre
    return Mixture(weights, locs, scale.expand(num_components, *scale.shape[1:]).clone())


def prior_start(rest: Mixture, weight: float) -> Mixture:
    """One standard normal of weight 1 - e before the components of `rest`, of weight e together.

    log m(x) >= log(1 - e) + log N(x; 0, I) on any data, so a stage that starts here cannot lower
    the bound of the model below by more than -log(1 - e).

    Args:
        rest: the other components; there may be none, when e has to be 0.
        weight: e.
    """
    loc = rest.locs.new_zeros(1, rest.locs.shape[1])
    scale = torch.ones_like(loc).diag_embed() if rest.is_full else torch.ones_like(loc)
    return Mixture(
        torch.cat([rest.weights.new_full((1,), 1.0 - weight), weight * rest.weights]),
        torch.cat([loc, rest.locs]),
        torch.cat([scale, rest.scale]),
    )


def _reseed(
    data: Tensor, centre: Tensor, mixture: Mixture, empty: Tensor, generator: torch.Generator | None
) -> Mixture:
    """Place empty components anew at random data, as wide as the average living component.

    Their number is a shape of the trained module, so they are not removed (a weight of 0 is a
    logit of minus infinity, which no gradient leaves). A random datum rather than the worst
    explained one: on an outlier a component would shrink to the variance floor.
    """
    weights, locs, scale = (part.clone() for part in mixture)
    index = _draw(data.new_ones(len(data)), int(empty.sum()), generator)
    locs[empty] = data[index].double() - centre
    alive = torch.where(empty, 0.0, weights)
    alive = alive / alive.sum()
    if mixture.is_full:
        pooled = torch.einsum("k,kde,kfe->df", alive, scale, scale)
        scale[empty] = torch.linalg.cholesky(pooled)
    else:
        scale[empty] = (alive @ scale.square()).sqrt()
    share = RESEED_WEIGHT / len(weights)
    weights = torch.where(empty, share, alive * (1.0 - share * empty.sum()))
    return Mixture(weights, locs, scale)


@torch.no_grad()
def fit(
    data: Tensor,
    start: Mixture,
    *,
    max_iterations: int = 200,
    tolerance: float = 1e-4,
    variance_floor: float = 1e-6,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Fit:
    """Improve a mixture by EM until the mean log-likelihood gains less than the tolerance.

    r_k(x) = w_k N(x; mu_k, Sigma_k) / m(x);   w_k = mean of r_k, (mu_k, Sigma_k) = r_k's moments

    The likelihood never falls, except by at most -log(1 - 0.01) in the step after an empty
    component was placed anew; whatever happens, the result is no worse on these data than the
    start. A component is empty when it explains less than a thousandth of a datum; in all, as many
    are placed anew as there are components, then they are left where they are.

    Args:
        data: (N, D), float32 or float64.
        start: where to begin.
        max_iterations: steps at most.
        tolerance: least gain of a step in nats per datum; 0 makes every step.
        variance_floor: least variance, in units of each column's variance.
        generator: source of randomness for empty components; None is torch's global one.
        chunk: rows at a time; None keeps what is computed within the cache.

    Raises:
        ValueError: the log-likelihood is not finite.

    Reference:
        Dempster, Laird and Rubin (1977), "Maximum likelihood from incomplete data".
    """
    centre, unit = centre_and_unit(data)
    mixture = first = start.to(centre).shifted(-centre)
    history: list[float] = []
    spare, reseeded, fresh, converged = len(start.weights), 0, False, False
    for step in range(max_iterations + 1):
        last = step == max_iterations
        found = expectation(data, centre, mixture, chunk=chunk, moments=not last)
        history.append(found.log_density)
        if not math.isfinite(found.log_density):
            raise ValueError(
                f"EM: the mean log-likelihood after {step} steps is {found.log_density}; "
                "rescale the data or start nearer to them."
            )
        small = step > 0 and history[-1] - history[-2] < tolerance
        converged = small and not fresh and tolerance > 0.0
        if converged or last:
            break
        empty = found.counts < EMPTY
        wide = empty.view(-1, *[1] * (mixture.scale.dim() - 1))
        old = mixture.scale @ mixture.scale.mT if mixture.is_full else mixture.scale.square()
        scale = floored_scale(torch.where(wide, old, found.covariance), unit, variance_floor)
        mixture = Mixture(
            found.counts / found.counts.sum(),
            torch.where(empty[:, None], mixture.locs, found.locs),
            torch.where(wide, mixture.scale, scale),
        )
        fresh = bool(empty.any()) and spare >= int(empty.sum())
        if fresh:
            mixture = _reseed(data, centre, mixture, empty, generator)
            spare, reseeded = spare - int(empty.sum()), reseeded + int(empty.sum())
    if history[-1] < history[0]:  # the start broke the variance floor, or rounding
        mixture = first
        history.append(history[0])
    return Fit(mixture.shifted(centre), history, converged, reseeded)
