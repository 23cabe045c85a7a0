"""Expectations under a posterior by Pareto-smoothed importance weights of its guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyroboost.diagnostics._draws import Collected, collect, read
from pyroboost.evaluation import _traces as tr
from pyroboost.sampling.psis import good_k, pareto_k, psis

__all__ = ["Expectation", "psis_expectation"]

Function = Callable[[dict[str, Tensor]], Tensor]
Wanted = str | Function | Sequence[str] | Mapping[str, str | Function] | None
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Expectation:
    r"""Moments of a quantity h under the posterior, by smoothed weights, and under the guide.

    Args:
        name: what the quantity is called.
        mean: $\sum_s \tilde w_s h_s$.  # (...)
        std_error: its Monte Carlo standard error.  # (...)
        sd: standard deviation under the posterior.  # (...)
        sd_error: its Monte Carlo standard error.  # (...)
        levels: levels of the quantiles.
        quantiles: quantiles under the posterior.  # (Q, ...)
        guide_mean: mean under the guide, without weights.  # (...)
        guide_sd: standard deviation under the guide, likewise.  # (...)
        guide_quantiles: quantiles under the guide, likewise.  # (Q, ...)
        pareto_k: $\hat k$ of $w |h|$, which the mean needs below the limit; empty where it was
            not asked for.  # (...)
        weight_pareto_k: $\hat k$ of w: one for all, or one per datum.  # (N,)
        ess: effective sample size of the smoothed weights, likewise.  # (N,)
        num_samples: draws S.
    """

    name: str
    mean: Tensor
    std_error: Tensor
    sd: Tensor
    sd_error: Tensor
    levels: tuple[float, ...] = field(repr=False)
    quantiles: Tensor = field(repr=False)
    guide_mean: Tensor = field(repr=False)
    guide_sd: Tensor = field(repr=False)
    guide_quantiles: Tensor = field(repr=False)
    pareto_k: Tensor
    weight_pareto_k: Tensor
    ess: Tensor
    num_samples: int

    @property
    def shift(self) -> Tensor:
        """What the weights change: corrected mean minus plain mean, in corrected deviations."""
        return _ratio(self.mean - self.guide_mean, self.sd)

    def describe(self) -> str:
        """Say in words what was found, and what the weights cannot correct."""
        limit = good_k(self.num_samples)
        worst = torch.cat([self.pareto_k.flatten(), self.weight_pareto_k.flatten()])
        shape = "" if self.mean.dim() == 0 else f", {self.mean.numel()} values; the first"
        k = f"{float(worst.max()):.2f}"
        return (
            f"E[{self.name}]{shape}: {_first(self.mean):.4g} ± {_first(self.std_error):.2g}, sd "
            f"{_first(self.sd):.4g} ± {_first(self.sd_error):.2g} by smoothed weights; "
            f"{_first(self.guide_mean):.4g} and {_first(self.guide_sd):.4g} under the guide.\n"
            f"Largest k-hat, of w and of w|h|: {k}, limit {limit:.2f} for {self.num_samples} "
            f"draws; ESS {float(self.ess.min()):.0f} at least.\n"
            "The errors hold below the limit, and for the region that draws reached: a mode that "
            "no draw reached is in none of these numbers."
        )

    def __str__(self) -> str:
        return self.describe()


def psis_expectation(
    pair: tr.Pair,
    functions: Wanted,
    *args: Any,
    num_samples: int = 1000,
    visible: str | None = None,
    levels: Sequence[float] = LEVELS,
) -> Any:
    r"""Estimate expectations under the posterior with a guide's smoothed importance weights.

    $$\hat\mu = \sum_s \tilde w_s h(z_s), \qquad
    \mathrm{se}^2 = \sum_s \tilde w_s^2 \bigl(h(z_s) - \hat\mu\bigr)^2, \qquad
    w = \frac{p(x, z)}{q(z)}$$

    Where every datum has hidden values of its own, each has its own weights.

    Args:
        pair: a meta-model, or any Pyro model and guide.
        functions: a site of the model, in its own (constrained) space; a function of the dict of
            one draw's site values that returns a tensor; several in a list or a dict of names;
            ``None``: every latent site. Where data are separate, a function returns one row per
            datum, first.
        *args: arguments of both programs.
        num_samples: draws S of the guide.
        visible: the observed site that is the data, for models with several.
        levels: levels of quantiles.

    Returns:
        An :class:`Expectation` for one site or function, a dict of them for several.

    Raises:
        ValueError: an unknown site, fewer than 25 draws, weights that are NaN or all zero, a
            function of the wrong shape, or a guide without a density.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(0.8, 0.8))
        >>> found = psis_expectation((model, guide), "z", num_samples=4000)
        >>> bool((found.mean - 1.0).abs() < 4 * found.std_error)
        True

    Reference:
        Vehtari, Simpson, Gelman, Yao and Gabry, Pareto smoothed importance sampling (2024),
        sections 2 and 3; Owen, Monte Carlo theory, methods and examples (2013), Eq. 9.9.
    """
    item = read(pair, args, visible, "psis_expectation")
    draws = collect(item, args, num_samples)
    one = isinstance(functions, str) or (callable(functions) and not isinstance(functions, Mapping))
    found = {
        name: expectation(draws, name, what, levels)
        for name, what in _named(functions, draws).items()
    }
    return next(iter(found.values())) if one else found


def _named(functions: Wanted, draws: Collected) -> dict[str, str | Function]:
    if functions is None:
        return {name: name for name in draws.latent}
    if isinstance(functions, Mapping):
        return dict(functions)
    if isinstance(functions, str):
        return {functions: functions}
    if callable(functions):
        return {getattr(functions, "__name__", "function"): functions}
    names = [f if isinstance(f, str) else getattr(f, "__name__", "function") for f in functions]
    if len(set(names)) < len(names):
        raise ValueError(
            f"psis_expectation: two of {names} have one name; pass a dict with a name for each."
        )
    return dict(zip(names, functions, strict=True))


def expectation(
    draws: Collected,
    name: str,
    what: str | Function,
    levels: Sequence[float] = LEVELS,
    *,
    tails: bool = True,
) -> Expectation:
    """Weigh one quantity; ``tails=False`` leaves the k-hat of w|h| out, a fit for each value."""
    if any(not 0 < level < 1 for level in levels):
        raise ValueError(f"psis_expectation: levels are {list(levels)}; they lie between 0 and 1.")
    values = _values(draws, name, what)
    table = draws.log_weights.double().cpu()
    smoothed = psis(table)
    if bool((table.amax(0) == -torch.inf).any()):
        raise ValueError(
            "psis_expectation: every weight of a datum is zero: the guide draws where the "
            "posterior has no mass; refit the guide."
        )
    count, rows = table.shape
    flat = values.reshape(count, rows, -1)
    weights = smoothed.log_weights.exp()[:, :, None]
    moments = _moments(flat, weights, levels)
    plain = _moments(flat, torch.full_like(weights, 1 / count), levels)
    shape = values.shape[1:]

    def put(value: Tensor) -> Tensor:
        value = value.reshape(shape)
        return draws.back(what, value) if isinstance(what, str) else value

    own = pareto_k(table[:, :, None] + flat.abs().log()) if tails else flat[0] * torch.nan
    return Expectation(
        name=name,
        **{key: put(value) for key, value in moments.items() if key != "quantiles"},
        levels=tuple(levels),
        quantiles=torch.stack([put(q) for q in moments["quantiles"]]),
        guide_mean=put(plain["mean"]),
        guide_sd=put(plain["sd"]),
        guide_quantiles=torch.stack([put(q) for q in plain["quantiles"]]),
        pareto_k=put(own) if tails else own.new_empty(0),
        weight_pareto_k=smoothed.pareto_k,
        ess=1 / weights.square().sum(0)[:, 0],
        num_samples=count,
    )


def _values(draws: Collected, name: str, what: str | Function) -> Tensor:
    """Return a quantity at every draw, (S, ...), or (S, N, ...) where data are separate."""
    if isinstance(what, str):
        if what not in draws.sites:
            raise ValueError(
                f"psis_expectation: there is no site '{what}'; the model has "
                f"{', '.join(map(repr, draws.sites))}."
            )
        return draws.values(what).double().cpu()
    sites = {n: v.values for n, v in draws.sites.items()}
    count = len(draws.log_p)
    each = [torch.as_tensor(what({n: v[s] for n, v in sites.items()})) for s in range(count)]
    values = torch.stack([value.detach().double().cpu() for value in each])
    rows = draws.log_weights.shape[1]
    if draws.where.separate and (values.dim() < 2 or values.shape[1] != rows):
        raise ValueError(
            f"psis_expectation: '{name}' returns {tuple(values.shape[1:])} while each of {rows} "
            "data has its own weights; return one row per datum."
        )
    if bool(values.isnan().any()):
        raise ValueError(f"psis_expectation: '{name}' is NaN at some draw; mend the function.")
    return values


def _moments(values: Tensor, weights: Tensor, levels: Sequence[float]) -> dict[str, Any]:
    """Weighted moments over draws, (S, N, M) by (S, N, 1), with self-normalised errors."""
    mean = (weights * values).sum(0)
    centred = values - mean
    squared = weights.square()
    # As with equal weights, where it is S / (S - 1), the mean's own error is given back.
    variance = (weights * centred.square()).sum(0) / (1 - squared.sum(0)).clamp(min=1e-12)
    sd = variance.sqrt()
    error = (squared * (centred.square() - variance).square()).sum(0).sqrt()
    return {
        "mean": mean,
        "std_error": (squared * centred.square()).sum(0).sqrt(),
        "sd": sd,
        "sd_error": _ratio(error, 2 * sd),
        "quantiles": weighted_quantiles(values, weights, levels),
    }


def weighted_quantiles(values: Tensor, weights: Tensor, levels: Sequence[float]) -> Tensor:
    """Quantiles of weighted draws, linear between the middles of their weights.  # (Q, ...)."""
    order = values.argsort(0)
    ordered = values.gather(0, order)
    weight = weights.expand_as(values).gather(0, order)
    middle = weight.cumsum(0) - weight / 2
    found = []
    for level in levels:
        upper = (middle < level).sum(0, keepdim=True).clamp(1, len(values) - 1)
        low, high = middle.gather(0, upper - 1), middle.gather(0, upper)
        part = ((level - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        start, end = ordered.gather(0, upper - 1), ordered.gather(0, upper)
        found.append((start + part * (end - start))[0])
    return torch.stack(found)


def _ratio(value: Tensor, scale: Tensor) -> Tensor:
    """Divide, with zero for what is zero and does not vary."""
    return torch.where((value == 0) & (scale == 0), torch.zeros_like(value), value / scale)


def _first(values: Tensor) -> float:
    return float(values.flatten()[0])
