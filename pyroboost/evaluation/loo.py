"""Leave-one-out cross-validation for draws of a guide."""

from __future__ import annotations

from typing import Any

from pyroboost import _arviz
from pyroboost.evaluation import _traces as tr
from pyroboost.evaluation.inference_data import to_arviz

__all__ = ["psis_loo"]


def psis_loo(
    pair: tr.Pair,
    data: Any,
    *args: Any,
    num_samples: int = 1000,
    visible: str | None = None,
) -> Any:
    r"""Estimate leave-one-out predictive densities, corrected for the guide.

    $$\mathrm{elpd} = \sum_n \log p(x_n \mid x_{-n})$$

    Where data share hidden values and ArviZ is 1.0 or later, the draws are weighted by $p(h, x) /
    (q(h) \, p(x_n \mid h))$ (``loo_approximate_posterior``); otherwise they are resampled by their
    Pareto-smoothed weights first. Draws of a guide never enter leave-one-out as they are. Where
    every datum has hidden values of its own, leaving it out leaves them at their prior: the
    result is then a harmonic mean for $\log m(x_n)$, which :func:`log_likelihood` estimates far
    better.

    Args:
        pair: a meta-model, or any Pyro model and guide.
        data: first argument of both programs.  # (N, ...)
        *args: further arguments.
        num_samples: draws S.
        visible: the observed site that is the data; only for a (model, guide) with several.

    Returns:
        ArviZ's own result, pointwise, with its Pareto k: elpd is ``.elpd_loo`` before ArviZ 1.0
        and ``.elpd`` from then on.

    Raises:
        ValueError: fewer than 25 draws, weights that are NaN, or a guide without a density.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("mean", dist.Normal(x.mean(), len(x) ** -0.5))
        >>> found = psis_loo((model, guide), torch.randn(20), num_samples=500)
        >>> int(found.n_data_points)
        20

    Reference:
        Magnusson et al., Bayesian leave-one-out cross-validation for large data (2019), Eq. 9.
    """
    options: dict[str, Any] = {
        "num_samples": num_samples,
        "visible": visible,
        "prior": False,
        "predictive": False,
    }
    item = tr.subject(pair, (data, *args), visible, "psis_loo")
    name = item.visible.replace("/", ".")
    if _arviz.is_one() and item.pair is None:
        draws = to_arviz(pair, data, *args, **options)
        if draws["sample_stats"]["log_p"].ndim == 2:
            return _arviz.loo_approximate(draws, name)
    return _arviz.loo(to_arviz(pair, data, *args, resample=True, **options), name)
