"""The evidence upper bound: what reference draws of the posterior say of a guide's density."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from pyroboost.diagnostics._draws import gather, read
from pyroboost.diagnostics._reference import Reference, convergence, read_reference
from pyroboost.evaluation import _traces as tr
from pyroboost.evaluation._together import imposed, runs_at
from pyroboost.evaluation.posterior import Estimate

__all__ = ["eubo"]


def eubo(
    pair: tr.Pair,
    reference: Any,
    *args: Any,
    num_samples: int = 1000,
    visible: str | None = None,
    group_by_chain: bool = False,
) -> Estimate:
    r"""Estimate the evidence upper bound of a guide from reference draws of the posterior.

    $$\mathrm{EUBO} = \mathbb{E}_{p(z \mid x)}[\log p(x, z) - \log q(z)]
    = \log p(x) + \mathrm{KL}(p \,\|\, q) \ge \log p(x)$$

    Mass of the posterior that the guide misses makes it large, where the ELBO and the importance
    weights of the guide's own draws notice nothing. The difference of EUBO and ELBO is the sum of
    both divergences and needs no evidence. It is a bound for draws of the posterior itself: what
    the reference misses is missing here too.

    The guide's density is taken at the draws: through the unconstrained space for Pyro's
    automatic guides, in their own space for guides with sites of their own.

    Args:
        pair: a meta-model, or any Pyro model and guide.
        reference: a ``pyro.infer.MCMC`` that has run, or values by site.  # (R, ...)
        *args: arguments of both programs.
        num_samples: draws of the reference to use at most, evenly spaced.
        visible: the observed site that is the data, for models with several.
        group_by_chain: whether the tensors of the reference are (chains, draws, ...).

    Returns:
        The bound in nats, per data set, or per datum where each has its own hidden values; its
        error counts the effective draws of the reference (over data, their spread). Of a guide
        that is much too narrow a few far draws of the reference make most of the bound, and the
        error is itself noisy and mostly too small: take the bound as large, not as known to that
        error.

    Raises:
        ValueError: a guide that cannot score points which it did not draw, or reference draws of
            other sites or outside the model's support.

    Example:
        >>> import pyro
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(0.0, 0.5**0.5))
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(0.0))
        >>> found = eubo((model, guide), {"z": torch.randn(50) * 0.5**0.5})
        >>> abs(found.value - exact.item()) < 1e-5
        True

    Reference:
        Blessing, Jia, Esslinger, Vargas and Neumann, Beyond ELBOs: a large-scale evaluation of
        variational methods for sampling (2024), section 3.
    """
    item = read(pair, args, visible, "eubo")
    return upper_bound(item, args, read_reference("eubo", reference, group_by_chain), num_samples)


def upper_bound(
    item: tr.Subject, args: Sequence[Any], reference: Reference, num_samples: int
) -> Estimate:
    """Score reference draws by model and guide."""
    thinned = reference.thin(num_samples)
    drawn = gather(item, args, _scored(item, args, thinned))
    table = drawn.log_weights.double()
    if not bool(table.isfinite().all()):
        bad = int((~table.isfinite()).any(1).sum())
        raise ValueError(
            f"eubo: {bad} of {len(table)} reference draws have no finite density under the model "
            "or the guide; a guide without mass at them has an infinite bound."
        )
    per_datum, (constant, error) = table.mean(0), item.normalisation()
    if table.shape[1] > 1:
        spread = float(per_datum.std()) / math.sqrt(table.shape[1])
    else:
        chains = next(iter(thinned.chains.values())).shape[0]
        ess = float(convergence(table.reshape(chains, -1, 1))[0][0])
        ess = len(table) if math.isnan(ess) else min(ess, len(table))
        spread = float(table.std()) / math.sqrt(ess)
    shared = error if constant != "exact" else 0.0
    return Estimate(float(per_datum.mean()), math.hypot(spread, shared), per_datum)


def _scored(item: tr.Subject, args: Sequence[Any], reference: Reference) -> Iterator[tr.Traced]:
    """Run guide and model at every draw of the reference."""
    first = next(tr.traced(item, args, 1))
    missing = [name for name in first.latent if name not in reference.chains]
    if missing:
        raise ValueError(
            f"eubo: the reference has no draws of {', '.join(map(repr, missing))}; pass draws of "
            "every latent site of the model."
        )
    draws = reference.draws
    for name in first.latent:
        shape = first.model[name]["value"].shape
        if draws[name].shape[1:] != shape:
            raise ValueError(
                f"eubo: reference draws of '{name}' have shape {tuple(draws[name].shape[1:])}, the "
                f"model's site has {tuple(shape)}."
            )
    packed = _packed(item, first)
    values = {name: draws[name].to(first.model[name]["value"]) for name in first.latent}
    each = [{n: v[i] for n, v in values.items()} for i in range(reference.num_draws)]
    inner = [_inner(first, value, packed) for value in each]
    yield _run(item, args, each[0], inner[0])  # refuses a guide that cannot be scored there
    drawn = {name: torch.stack([one[name] for one in inner]) for name in inner[0]}
    together = runs_at(item, args, first, drawn, values)
    for index in range(1, reference.num_draws):
        if together is None:
            yield _run(item, args, each[index], inner[index])
        else:
            _check_return(together[index], each[index], inner[index])
            yield together[index]


def _run(
    item: tr.Subject, args: Sequence[Any], values: Mapping[str, Tensor], inner: dict[str, Tensor]
) -> tr.Traced:
    guide, model = imposed(item.guide, inner), imposed(item.model, values)
    try:
        run = next(tr.traced(replace(item, guide=guide, model=model), args, 1))
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            "eubo: the guide cannot score a point that it did not draw "
            f"({type(error).__name__}: {error}); use flows with an inverse."
        ) from error
    _check_return(run, values, inner)
    return run


def _check_return(
    run: tr.Traced, values: Mapping[str, Tensor], inner: Mapping[str, Tensor]
) -> None:
    """Refuse what a guide computes from its draws, if it is not the reference draw."""
    for name in run.guide.keys() - inner.keys():
        found, wanted = run.guide[name]["value"], values[name]
        if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"eubo: the guide computes '{name}' from other sites and does not come back to "
                "the reference draw; it cannot be scored there."
            )


def _packed(item: tr.Subject, first: tr.Traced) -> dict[str, list[str]]:
    """Return which sites Pyro's automatic guides pack into one vector, by its name."""
    found = {}
    for part in (module for program in item.modules for module in program.modules()):
        if isinstance(part, AutoContinuous) and part.prototype_trace is not None:
            names = [name for name, _ in part.prototype_trace.iter_stochastic_nodes()]
            found[f"_{part._pyro_name}_latent"] = names
    return {name: names for name, names in found.items() if name in first.guide}


def _inner(
    first: tr.Traced, values: Mapping[str, Tensor], packed: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    """Turn values of the model's sites into values of those that the guide draws."""
    found, computed = {}, set()
    for name, site in first.guide.items():
        base = name.removesuffix("_unconstrained")
        if not site["infer"].get("is_auxiliary"):
            if not isinstance(site["fn"], dist.Delta) or name not in first.latent:
                found[name] = values[name]
            else:
                computed.add(name)
        elif name in packed:
            parts = [_unconstrained(first, n, values).reshape(-1) for n in packed[name]]
            found[name] = torch.cat(parts)
        elif base != name and base in first.latent:
            found[name] = _unconstrained(first, base, values).reshape(site["value"].shape)
        else:
            raise ValueError(
                f"eubo: the guide draws '{name}' besides the model's sites, and its value at a "
                "reference draw is unknown; use AutoNormal, a guide that packs its sites "
                "(AutoMultivariateNormal and its kin) or one with the model's sites alone."
            )
    if computed and len(found.keys() - computed) == 0:
        raise ValueError(
            f"eubo: the guide gives {', '.join(map(repr, computed))} without drawing; it has no "
            "density at reference draws."
        )
    return found


def _unconstrained(first: tr.Traced, name: str, values: Mapping[str, Tensor]) -> Tensor:
    value: Tensor = biject_to(first.model[name]["fn"].support).inv(values[name])
    if not bool(value.isfinite().all()):
        raise ValueError(
            f"eubo: a reference draw of '{name}' lies on or beyond the edge of its support, where "
            "the guide has no density; check the reference's sites and units."
        )
    return value
