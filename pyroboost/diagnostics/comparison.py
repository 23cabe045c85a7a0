"""A guide's draws against reference draws of the same posterior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyroboost.diagnostics._draws import columns
from pyroboost.diagnostics._reference import Reference, read_reference
from pyroboost.diagnostics.expectations import LEVELS, weighted_quantiles
from pyroboost.diagnostics.two_sample import Distance, TwoSample, classifier_test, distance

__all__ = ["Comparison", "SiteComparison", "compare"]


@dataclass(frozen=True)
class SiteComparison:
    """One site of a guide against the reference; errors are in standard deviations of the latter.

    Args:
        mean_error: mean minus reference mean.  # (...)
        sd_error: standard deviation over that of the reference, minus one.  # (...)
        quantile_error: quantiles minus reference quantiles.  # (Q, ...)
        distance: sliced Wasserstein distance of standardised draws.
        two_sample: the classifier's test.
    """

    mean_error: Tensor
    sd_error: Tensor
    quantile_error: Tensor = field(repr=False)
    distance: Distance
    two_sample: TwoSample


@dataclass(frozen=True)
class Comparison:
    """A guide against a reference, site by site and as a whole.

    Args:
        sites: one comparison per site.
        distance: sliced Wasserstein distance of all coordinates, standardised.
        two_sample: the classifier's test on all coordinates.
        levels: levels of the quantiles.
        noise: error of a mean that finite draws alone make, in reference deviations.
        reference: the reference and how well its chains agree.
        left_out: sites that only one side has.
    """

    sites: dict[str, SiteComparison]
    distance: Distance
    two_sample: TwoSample
    levels: tuple[float, ...]
    noise: float
    reference: Reference = field(repr=False)
    left_out: tuple[str, ...]

    @property
    def mean_error(self) -> float:
        """The largest error of a mean, in reference deviations."""
        return max(float(site.mean_error.abs().max()) for site in self.sites.values())

    @property
    def sd_error(self) -> float:
        """The largest relative error of a standard deviation."""
        return max(float(site.sd_error.abs().max()) for site in self.sites.values())

    @property
    def quantile_error(self) -> float:
        """The largest error of a quantile, in reference deviations."""
        return max(float(site.quantile_error.abs().max()) for site in self.sites.values())

    def table(self) -> str:
        """Return one line per site, the largest error of its coordinates in each column."""
        width = max(4, *(len(name) for name in self.sites))
        head = ("mean error", "sd error", "quantiles", "SW", "null", "AUC", "p")
        lines = [" ".join(["site".ljust(width), *(h.rjust(10) for h in head)])]
        for name, s in self.sites.items():
            row = [
                *(f"{_largest(v):+.3f}" for v in (s.mean_error, s.sd_error, s.quantile_error)),
                *(f"{v:.3f}" for v in (s.distance.value, s.distance.null, s.two_sample.auc)),
                f"{s.two_sample.p_value:.2g}",
            ]
            lines.append(" ".join([name.ljust(width), *(cell.rjust(10) for cell in row)]))
        return "\n".join(lines)

    def describe(self) -> str:
        """Say in words what was measured, and what neither number can see."""
        r = self.reference
        lines = [
            f"Against {r.num_draws} reference draws (ESS {r.ess:.0f}, R-hat {r.r_hat:.3f}); errors "
            f"in reference standard deviations, of which finite draws explain {self.noise:.3f}.",
            self.table(),
            f"All coordinates: sliced Wasserstein {self.distance}; two-sample test "
            f"{self.two_sample}.",
            "Means, deviations and quantiles see one coordinate at a time; the distance sees "
            "linear combinations, the classifier any difference that its trees find in "
            f"{self.two_sample.num_draws} draws, though not how much it matters. None sees what "
            "the reference itself has missed.",
            *r.doubts(),
        ]
        if self.left_out:
            lines.append(f"Not compared, only on one side: {', '.join(self.left_out)}.")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()


def compare(
    draws: Mapping[str, Tensor],
    reference: Any,
    *,
    group_by_chain: bool = False,
    levels: Sequence[float] = LEVELS,
    num_projections: int = 200,
    classifier: Any = None,
) -> Comparison:
    r"""Compare independent draws of a guide with reference draws, such as those of NUTS.

    $$\frac{\mathbb{E}_q z - \mathbb{E}_r z}{\mathrm{sd}_r z}, \qquad
    \frac{\mathrm{sd}_q z}{\mathrm{sd}_r z} - 1, \qquad \mathrm{SW}_2(q, r), \qquad
    \text{AUC of a classifier}$$

    The classifier gets as many reference draws as the reference has effective ones, evenly
    spaced, since draws that resemble their neighbours would be told apart by that alone.

    Args:
        draws: values by site, independent draws.  # (S, ...)
        reference: a ``pyro.infer.MCMC`` that has run, or values by site.  # (R, ...)
        group_by_chain: whether the tensors of the reference are (chains, draws, ...).
        levels: levels of the quantiles.
        num_projections: directions of the sliced Wasserstein distance.
        classifier: see :func:`classifier_test`.

    Returns:
        Errors, distance and test, per site and for all coordinates together.

    Raises:
        ValueError: no common site, other shapes, or draws that are NaN or infinite.
        TypeError: a reference that is neither an MCMC nor a dict.

    Example:
        >>> r = {"z": torch.randn(4, 250, 2)}
        >>> found = compare({"z": torch.randn(1000, 2) * 2.0}, r, group_by_chain=True)
        >>> found.sites["z"].sd_error.shape, found.sd_error > 0.5, found.two_sample.p_value < 0.01
        (torch.Size([2]), True, True)

    Reference:
        Lopez-Paz and Oquab (2017); Bonneel et al. (2015); Vehtari, Gelman, Simpson, Carpenter and
        Burkner, Rank-normalization, folding, and localization (2021), for R-hat and ESS.
    """
    given = read_reference("compare", reference, group_by_chain)
    names = [name for name in given.chains if name in draws]
    if not names:
        raise ValueError(
            f"compare: the draws have {list(draws)}, the reference {list(given.chains)}; there is "
            "no common site."
        )
    pooled = given.draws
    for name in names:
        _check(name, torch.as_tensor(draws[name]), pooled[name])
    if any(not 0 < level < 1 for level in levels):
        raise ValueError(f"compare: levels are {list(levels)}; they lie between 0 and 1.")
    effective = max(20, min(int(given.ess), given.num_draws))
    options = {"levels": levels, "num_projections": num_projections, "classifier": classifier}
    sites = {n: _site({n: draws[n]}, {n: pooled[n]}, effective, options) for n in names}
    whole = _site({n: draws[n] for n in names}, {n: pooled[n] for n in names}, effective, options)
    count = len(draws[names[0]])
    return Comparison(
        sites=sites,
        distance=whole.distance,
        two_sample=whole.two_sample,
        levels=tuple(levels),
        noise=(1 / count + 1 / given.ess) ** 0.5,
        reference=given,
        left_out=tuple(n for n in (*draws, *given.chains) if n not in names),
    )


def _check(name: str, mine: Tensor, theirs: Tensor) -> None:
    if mine.shape[1:] != theirs.shape[1:] or len(mine) < 2:
        raise ValueError(
            f"compare: '{name}' has draws of shape {tuple(mine.shape)} and reference draws of "
            f"shape {tuple(theirs.shape)}; only the first dimension, the draws, may differ."
        )
    if not bool(mine.double().isfinite().all()):
        raise ValueError(f"compare: draws of '{name}' are NaN or infinite.")


def _site(
    draws: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    effective: int,
    options: Mapping[str, Any],
) -> SiteComparison:
    mine, theirs = columns(draws)[0], columns(reference)[0]
    centre, scale = theirs.mean(0), theirs.std(0)
    still = (scale == 0) & (mine == centre).all(0)  # such as the zeros of a Cholesky factor
    safe = scale.masked_fill(still, 1.0)
    mine, theirs = (mine - centre) / safe, (theirs - centre) / safe
    quantiles = [
        weighted_quantiles(t, torch.full_like(t, 1 / len(t)), options["levels"])
        for t in (mine, theirs)
    ]
    moving = ~still if bool((~still).any()) else torch.ones_like(still)
    shape = next(iter(reference.values())).shape[1:] if len(reference) == 1 else (-1,)
    left, right = mine[:, moving], theirs[:, moving]
    even = torch.linspace(0, len(right) - 1, min(effective, len(right))).round().long()
    finite = left.isfinite().all(1)  # infinite where only the reference stands still
    if not bool(finite.all()):
        raise ValueError(
            f"compare: the reference never moves in a coordinate of {list(reference)} where the "
            "draws do; leave that site out."
        )
    return SiteComparison(
        mean_error=mine.mean(0).reshape(shape),
        sd_error=(mine.std(0) - 1.0).masked_fill(still, 0.0).reshape(shape),
        quantile_error=(quantiles[0] - quantiles[1]).reshape(len(quantiles[0]), *shape),
        distance=distance(left, right, num_projections=options["num_projections"]),
        two_sample=classifier_test(left, right[even], classifier=options["classifier"]),
    )


def _largest(values: Tensor) -> float:
    flat = values.flatten()
    return float(flat[flat.abs().argmax()])
