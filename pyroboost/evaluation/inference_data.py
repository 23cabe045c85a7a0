"""Draws, densities and data of a pair as ArviZ knows them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyroboost import _arviz
from pyroboost.evaluation import _traces as tr
from pyroboost.evaluation._groups import Draws, Group, Variable, data_dim, dataset, dims_of
from pyroboost.sampling.psis import psis_resample

__all__ = ["to_arviz"]


def to_arviz(
    pair: tr.Pair,
    data: Any,
    *args: Any,
    num_samples: int = 1000,
    visible: str | None = None,
    prior: bool = True,
    predictive: bool = True,
    resample: bool = False,
) -> Any:
    r"""Draw from a pair and lay out what came as ArviZ's container, on one chain.

    Groups: ``posterior`` (draws of the guide), ``prior``, ``posterior_predictive``,
    ``prior_predictive``, ``log_likelihood`` ($\log m(x_n \mid h)$ of each datum at the posterior
    draws), ``observed_data``, ``constant_data`` (further tensors among the arguments) and
    ``sample_stats`` with ``log_p``, ``log_q`` and ``log_weight`` $= \log m(x, h) - \log q(h
    \mid x)$: one per datum where data have their own hidden values, else one per draw.

    Dimensions carry the names of their plates, others that of their site and place. Latent sites
    that the guide does not draw come from their prior and drop out of the weights. Draws of a
    guide are independent: R-hat, which compares chains, says nothing about them and is not
    offered; judge them by :func:`posterior_quality`.

    Args:
        pair: a meta-model, or any Pyro model and guide.
        data: first argument of both programs.  # (N, ...)
        *args: further arguments.
        num_samples: draws S; each runs the pair once on all the data.
        visible: the observed site that is the data; only for a (model, guide) with several.
        prior: whether to draw from the prior too.
        predictive: whether to draw data too, which takes the memory of S data sets, twice.
        resample: whether to resample the draws by their Pareto-smoothed weights, datum by datum
            where data have their own hidden values. They then stand for the posterior itself, as
            leave-one-out needs, and ``log_weight`` is left out.

    Returns:
        ``arviz.InferenceData`` before ArviZ 1.0, ``xarray.DataTree`` from then on; both have
        ``["posterior"]`` and ``to_netcdf(path)``.

    Raises:
        ValueError: no draws are asked for, or the guide has no density.

    Example:
        >>> from pyroboost.models import VAE
        >>> found = to_arviz(VAE(6, 2, units=8), torch.zeros(5, 6), num_samples=10)
        >>> found["posterior"]["z"].dims
        ('chain', 'draw', 'data', 'z_dim_1')
        >>> found["log_likelihood"]["x"].shape
        (1, 10, 5)

    Reference:
        Kumar et al., ArviZ (2019); the InferenceData schema specification.
    """
    if num_samples < 1:
        raise ValueError(f"to_arviz: num_samples is {num_samples}; ask for at least one draw.")
    everything = (data, *args)
    item = tr.subject(pair, everything, visible, "to_arviz")
    groups, where, plates = _posterior(item, everything, num_samples, predictive)
    if resample:
        _resample(groups, where)
    if prior:
        groups |= _prior(item, everything, num_samples, where, predictive)
    groups["constant_data"] = _constants(item, everything, groups["observed_data"], where, plates)
    attrs = {"resampled": "PSIS"} if resample else {}
    return _arviz.container(
        {
            name: dataset(name, group, attrs if name in _POSTERIOR else {})
            for name, group in groups.items()
            if group
        }
    )


_POSTERIOR = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats")
Groups = dict[str, dict[str, Variable]]


def _posterior(
    item: tr.Subject, args: Sequence[Any], count: int, predictive: bool
) -> tuple[Groups, tr.Layout, dict[str, int]]:
    """Run the pair; collect the groups that belong to posterior draws."""
    posterior, replicas = Group(), Group()
    likelihood: dict[str, Draws] = {}
    log_p, log_q = Draws([], None), Draws([], None)
    first, where = None, None
    for run in tr.traced(item, args, count):
        if first is None:
            first, where = run, tr.layout(item, run, args)
        assert where is not None
        for name in run.latent:
            posterior.add(name, run.model[name], where)
        for name, site in run.computed.items():
            posterior.add(name, site, where)
        for name in run.observed:
            site = run.model[name]
            _same(item, name, site["value"], first.model[name]["value"])
            axis = where.dim(site, site["unscaled_log_prob"].shape)
            names = [] if axis is None else [data_dim(name, site, where)]
            draws = likelihood.setdefault(name, Draws(names, None if axis is None else -1))
            draws.values.append(where.reduce(site))
        if predictive:
            site = run.model[item.visible]
            with torch.no_grad():
                replicas.add(item.visible, site, where, site["fn"].sample())
        log_p.values.append(where.total(run.model, run.scored))
        log_q.values.append(where.total(run.guide, list(run.guide)))
    assert first is not None
    assert where is not None
    site = first.model[item.visible]
    dims = [data_dim(item.visible, site, where)] if where.separate else []
    for draws in (log_p, log_q):
        draws.dims, draws.data_axis = dims, -1 if where.separate else None
    stats = {"log_p": log_p.variable(), "log_q": log_q.variable()}
    weight = stats["log_p"].values - stats["log_q"].values
    stats["log_weight"] = Variable(weight, dims, log_p.data_axis)
    observed = {
        n: Variable(first.model[n]["value"], dims_of(n, first.model[n])) for n in first.observed
    }
    groups: Groups = {
        "posterior": posterior.variables(),
        "posterior_predictive": replicas.variables(),
        "log_likelihood": {n: draws.variable() for n, draws in likelihood.items()},
        "sample_stats": stats,
        "observed_data": observed,
    }
    return groups, where, _plates(first)


def _plates(run: tr.Traced) -> dict[str, int]:
    sites = [*run.model.values(), *run.computed.values()]
    return {f.name: f.size for s in sites for f in s["cond_indep_stack"] if f.vectorized}


def _same(item: tr.Subject, name: str, value: Tensor, first: Tensor) -> None:
    if value is not first and not torch.equal(value, first):
        raise ValueError(
            f"to_arviz: '{name}' of {item.name} is observed with other values in every run; pass "
            "all the data at once, without a random subsample."
        )


def _prior(
    item: tr.Subject, args: Sequence[Any], count: int, where: tr.Layout, predictive: bool
) -> Groups:
    prior, replicas = Group(), Group()
    for _ in range(count):
        random, computed = tr.draw_prior(item, args)
        for name, site in (random | computed).items():
            if name != item.visible and (name in computed or not site["is_observed"]):
                prior.add(name, site, where)
        if predictive:
            replicas.add(item.visible, random[item.visible], where)
    return {"prior": prior.variables(), "prior_predictive": replicas.variables()}


def _resample(groups: Groups, where: tr.Layout) -> None:
    """Take draws of the guide in proportion to their smoothed weights, in every group at once."""
    chosen = psis_resample(groups["sample_stats"].pop("log_weight").values)
    for group in _POSTERIOR:
        for name, variable in list(groups[group].items()):
            values, axis = variable.values, variable.data_axis
            if not where.separate:
                variable.values = values[chosen]
            elif axis is None:  # one value for data that are now resampled apart
                del groups[group][name]
            else:
                moved = values.movedim(axis, 1)
                columns = torch.arange(moved.shape[1], device=moved.device)
                variable.values = moved[chosen, columns].movedim(1, axis)


def _constants(
    item: tr.Subject,
    args: Sequence[Any],
    observed: Mapping[str, Variable],
    where: tr.Layout,
    plates: Mapping[str, int],
) -> dict[str, Variable]:
    """Name the tensors among the arguments that are not observed."""
    seen = [variable.values for variable in observed.values()]
    taken = {*plates, *observed, *(d for v in observed.values() for d in v.dims)}
    data = next(iter(observed[item.visible].dims), None)
    found = {}
    for index, (name, value) in enumerate(zip(_names(item, len(args)), args, strict=True)):
        if not isinstance(value, Tensor) or not value.numel():
            continue
        if any(
            value.numel() == s.numel() and torch.equal(value.flatten(), s.flatten()) for s in seen
        ):
            continue
        if item.pair is not None and index == 0:
            continue  # x itself, perhaps in another dtype
        name = f"arg_{name}" if name in taken else name
        dims = [f"{name}_dim_{i}" for i in range(value.dim())]
        if dims and data is not None and len(value) == where.num_data:
            dims[0] = where.plate or data
        found[name] = Variable(value, dims)
    return found


def _names(item: tr.Subject, count: int) -> list[str]:
    """Name positional arguments as the model's signature does."""
    source = item.source
    source = getattr(source, "fn", source)
    try:
        parameters = list(inspect.signature(source).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [plain[i] if i < len(plain) else f"arg_{i}" for i in range(count)]
