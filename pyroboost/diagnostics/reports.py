"""One report of a posterior: every number beside what it can and cannot see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyroboost.diagnostics._draws import Collected, collect, read
from pyroboost.diagnostics._groups import container, sets
from pyroboost.diagnostics._reference import Reference, read_reference
from pyroboost.diagnostics.comparison import Comparison, compare
from pyroboost.diagnostics.expectations import Expectation, expectation
from pyroboost.diagnostics.upper_bound import upper_bound
from pyroboost.evaluation import _traces as tr
from pyroboost.evaluation.posterior import Estimate, PosteriorQuality, judge

__all__ = ["PosteriorReport", "report"]


@dataclass(frozen=True)
class PosteriorReport:
    """What draws of a guide, their weights and a reference tell of it as a posterior.

    Args:
        quality: k-hat, ESS, the ELBO, the importance-weighted bound, their gap.
        expectations: moments of each latent site, corrected by smoothed weights and plain.
        eubo: the evidence upper bound over reference draws; ``None`` without them.
        no_eubo: why there is none although there is a reference.
        comparison: the guide's draws against the reference's; ``None`` without them.
    """

    quality: PosteriorQuality
    expectations: dict[str, Expectation]
    eubo: Estimate | None
    no_eubo: str | None
    comparison: Comparison | None
    _drawn: Collected = field(repr=False)

    @property
    def elbo(self) -> Estimate:
        """Lower bound, in nats per data set or per datum."""
        return self.quality.elbo

    @property
    def evidence(self) -> Estimate:
        """Estimate of log p(x) by importance sampling with the guide."""
        return self.quality.importance_bound

    @property
    def reference(self) -> Reference | None:
        """The reference draws."""
        return None if self.comparison is None else self.comparison.reference

    @property
    def draws(self) -> dict[str, Tensor]:
        """The guide's draws of the latent sites.  # (S, ...)."""
        return self._drawn.latent_values()

    @property
    def divergence(self) -> Estimate | None:
        r"""EUBO minus ELBO, $\mathrm{KL}(q \| p) + \mathrm{KL}(p \| q)$: free of log p."""
        if self.eubo is None:
            return None
        per_datum = self.eubo.per_datum - self.elbo.per_datum.to(self.eubo.per_datum)
        error = math.hypot(self.eubo.std_error, self.elbo.std_error)
        if len(per_datum) > 1:
            error = float(per_datum.std()) / math.sqrt(len(per_datum))
        return Estimate(float(per_datum.mean()), error, per_datum)

    def describe(self) -> str:
        """Say in words what every number is, and what it can and cannot see."""
        low = self.evidence
        lines = [
            self.quality.describe(),
            f"Evidence: log p(x) is estimated at {low}, ESS {float(self.quality.ess.min()):.0f} at "
            "least. Its error is of the region that draws reached; missed mass makes it too low, "
            "by log 2 where one of two equal modes is missed, and leaves the error small.",
            self._shifts(),
        ]
        if self.comparison is None:
            lines.append(
                "No reference: nothing above can see mass that the guide misses, since all of it "
                "is computed from the guide's own draws. Draws of another method (reference=MCMC) "
                "add the upper bound, errors of moments, and a two-sample test."
            )
        else:
            lines += [self._upper(), self.comparison.describe()]
        return "\n".join(lines)

    def _shifts(self) -> str:
        mean, sd = "", ""
        if self.expectations:
            shift = {n: float(e.shift.abs().max()) for n, e in self.expectations.items()}
            ratio = {
                n: float((e.sd / e.guide_sd - 1).nan_to_num(0.0).abs().max())
                for n, e in self.expectations.items()
            }
            at, wide = max(shift, key=shift.__getitem__), max(ratio, key=ratio.__getitem__)
            mean, sd = f"{shift[at]:.3f} sd ('{at}')", f"{ratio[wide]:.1%} ('{wide}')"
        return (
            f"Smoothed weights move a mean by {mean} and a standard deviation by {sd} at most: "
            "errors of the guide that its own draws can see and correct, below the limit of k-hat."
        )

    def _upper(self) -> str:
        if self.eubo is None:
            return f"No upper bound: {self.no_eubo}"
        above = self.eubo.value - self.evidence.value
        error = math.hypot(self.eubo.std_error, self.evidence.std_error)
        text = (
            f"EUBO {self.eubo}, over reference draws: above log p(x) by KL(p || q). EUBO - ELBO "
            f"{self.divergence} is the sum of both divergences and needs no evidence. EUBO lies "
            f"{above:.3f} ± {error:.3f} above the evidence estimate. EUBO sees what the guide "
            "misses and the reference has, and is blind to what the reference missed."
        )
        if above > max(1.0, 4 * error):
            text += (
                " That is more than a nat: the reference has mass where the guide hardly draws, so "
                "that k-hat, ESS, gap and evidence above, all from the guide's draws, do not count "
                "it. Where the guide is much too narrow a few far draws of the reference make most "
                "of the bound, and its error, of those same draws, is itself noisy and mostly too "
                "small."
            )
        return text

    def __str__(self) -> str:
        return self.describe()

    def plot(self, names: Sequence[str] | None = None) -> Any:
        """Draw marginals: of the guide, weighted, and of the reference; return the ``Figure``."""
        from pyroboost.plotting_posterior import plot_marginals

        return plot_marginals(sets(self._drawn, self.reference), names=names)

    def plot_pairs(self, names: Sequence[str] | None = None) -> Any:
        """Draw pairs of coordinates of guide and reference; return the ``Figure``."""
        from pyroboost.plotting_posterior import plot_pairs

        shown = sets(self._drawn, self.reference)
        shown.pop("guide, weighted")
        return plot_pairs(shown, names=names)

    def to_arviz(self) -> Any:
        """Return ArviZ's container with draws, weights and reference.

        ``posterior`` holds the guide's draws, ``sample_stats`` their ``log_p``, ``log_q``,
        ``log_weight`` and smoothed normalised ``log_psis_weight``, ``reference`` the reference's
        draws by chain; the bounds are attributes of ``sample_stats``.
        """
        bounds = {"elbo": self.elbo, "evidence": self.evidence, "eubo": self.eubo}
        return container(self._drawn, self.reference, bounds)


def report(
    pair: tr.Pair,
    *args: Any,
    reference: Any = None,
    num_samples: int = 1000,
    visible: str | None = None,
    group_by_chain: bool = False,
    classifier: Any = None,
) -> PosteriorReport:
    r"""Judge a guide as a posterior by all that can be known of it, with words for each number.

    $$\mathrm{ELBO} \le \log p(x) \le \mathrm{EUBO}, \qquad \mathrm{EUBO} - \mathrm{ELBO} =
    \mathrm{KL}(q \,\|\, p) + \mathrm{KL}(p \,\|\, q)$$

    From the guide's own draws come the ELBO, an estimate of the evidence, k-hat, ESS, and moments
    with and without smoothed weights; none of them can see a mode that the guide misses. Draws of
    a reference add the upper bound and the errors of means, deviations, quantiles and whole
    distributions.

    Args:
        pair: a meta-model, or any Pyro model and guide: automatic, hand-written or amortised.
        *args: arguments of both programs.
        reference: a ``pyro.infer.MCMC`` that has run, or draws by site in the model's own
            (constrained) space.  # (R, ...)
        num_samples: draws S of the guide, and of the reference for the upper bound.
        visible: the observed site that is the data, for models with several.
        group_by_chain: whether the tensors of the reference are (chains, draws, ...).
        classifier: see :func:`classifier_test`.

    Returns:
        The report, with ``describe()``, ``plot()``, ``plot_pairs()`` and ``to_arviz()``.

    Raises:
        ValueError: fewer than 25 draws, weights that are NaN, a guide without a density, or a
            reference of other sites or shapes.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> r = {"z": 0.5**0.5 * torch.randn(4, 100)}
        >>> x = torch.tensor(0.0)
        >>> found = report((model, guide), x, reference=r, num_samples=100, group_by_chain=True)
        >>> abs(found.divergence.value) < 1e-5, "EUBO" in found.describe()
        (True, True)

    Reference:
        Yao et al., Yes, but did it work? (2018); Vehtari et al., Pareto smoothed importance
        sampling (2024); Blessing et al., Beyond ELBOs (2024).
    """
    item = read(pair, args, visible, "report")
    drawn = collect(item, args, num_samples)
    quality = judge(drawn.log_weights, item, not drawn.where.separate)
    moments = {
        name: expectation(drawn, name, name, tails=False)
        for name in drawn.latent
        if not drawn.where.separate or drawn.sites[name].data_axis is not None
    }
    comparison, bound, refusal = None, None, None
    if reference is not None:
        given = read_reference("report", reference, group_by_chain)
        values = {name: v.values for name, v in drawn.sites.items() if name in given.chains}
        comparison = compare(values, given, classifier=classifier)
        try:
            bound = upper_bound(item, args, given, num_samples)
        except ValueError as error:
            refusal = str(error)
    return PosteriorReport(quality, moments, bound, refusal, comparison, drawn)
