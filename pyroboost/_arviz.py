"""The one place that knows which ArviZ is installed: 0.x and 1.x differ in names and signs.

Arrays keep the dimensions ``(chain, draw, ...)`` in both; containers are ``InferenceData`` in 0.x
and ``xarray.DataTree`` in 1.x. Both have ``container["posterior"]`` and ``to_netcdf``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # NumPy too waits until it is needed
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "container",
    "convergence",
    "elpd",
    "good_k",
    "is_one",
    "load",
    "loo",
    "loo_approximate",
    "smooth",
]

Array: TypeAlias = "NDArray[np.float64]"


def load() -> Any:
    """Import ArviZ without the announcement that 0.23 makes once a day."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"\s*ArviZ is undergoing a major refactor", category=FutureWarning
        )
        import arviz
    return arviz


def is_one() -> bool:
    """Tell whether ArviZ 1.0 or later is installed."""
    return int(load().__version__.split(".")[0]) >= 1


def container(groups: Mapping[str, Any]) -> Any:
    """Put one ``xarray.Dataset`` per group into the container of this ArviZ."""
    if is_one():
        from xarray import DataTree

        return DataTree.from_dict({f"/{name}": group for name, group in groups.items()})
    return load().InferenceData(**groups)


def smooth(log_weights: Array) -> tuple[Array, Array]:
    """Return smoothed normalised log weights and Pareto k.

    Args:
        log_weights: finite or minus infinity, not constant.  # (N, S)

    Returns:
        Log weights that sum to one, (N, S), and k-hat, (N,).
    """
    import numpy as np

    with np.errstate(all="ignore"):  # a fit that fails is read from k
        if is_one():
            from arviz_stats.base import array_stats

            # 1.x takes log-likelihoods and negates them.
            smoothed, k = array_stats.psislw(-log_weights, r_eff=1.0, axis=-1)
        else:
            smoothed, k = load().psislw(log_weights.copy(), reff=1.0)
    return np.asarray(smoothed, dtype=np.float64), np.asarray(k, dtype=np.float64)


def good_k(num_samples: int) -> float:
    r"""Return the largest k that S draws can bear: $\min(1 - 1/\log_{10} S, 0.7)$.

    Reference:
        Vehtari et al., Pareto smoothed importance sampling (2024), Eq. 13.
    """
    return min(1.0 - 1.0 / math.log10(num_samples), 0.7)


def convergence(draws: Array) -> tuple[Array, Array]:
    """Return bulk effective sample sizes and split R-hat of chains.

    Args:
        draws: draws of each coordinate.  # (C, S, D)

    Returns:
        Both per coordinate, (D,); NaN where a coordinate never moves.
    """
    import numpy as np

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # constant coordinates are read from NaN
        if is_one():
            from arviz_stats.base import array_stats

            ess = array_stats.ess(draws, chain_axis=0, draw_axis=1)
            r_hat = array_stats.rhat(draws, chain_axis=0, draw_axis=1)
        else:
            arviz = load()
            data = arviz.convert_to_dataset({"x": draws})
            ess, r_hat = arviz.ess(data)["x"].values, arviz.rhat(data)["x"].values
    return np.asarray(ess, dtype=np.float64), np.asarray(r_hat, dtype=np.float64)


def loo(data: Any, var_name: str) -> Any:
    """Return ArviZ's leave-one-out result for independent draws from the posterior."""
    return load().loo(data, var_name=var_name, reff=1.0, pointwise=True)


def loo_approximate(data: Any, var_name: str) -> Any | None:
    """Return the result corrected for draws from a guide; ``None``: this ArviZ cannot."""
    if not is_one():
        return None
    stats = data["sample_stats"]
    return load().loo_approximate_posterior(
        data,
        log_p=stats["log_p"].values.reshape(-1),
        log_q=stats["log_q"].values.reshape(-1),
        var_name=var_name,
        pointwise=True,
    )


def elpd(result: Any) -> tuple[float, float]:
    """Return the expected log predictive density of a leave-one-out result, and its error."""
    return float(result.elpd if hasattr(result, "elpd") else result.elpd_loo), float(result.se)
