"""What a product asks of its parts: their support, their densities and their samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from pyroboost.compose.energy import Ratio
from pyroboost.contexts import forked_rng, service
from pyroboost.handlers import unobserve
from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel
from pyroboost.sampling import log_mean_exp
from pyroboost.sampling.gibbs import is_binary
from pyroboost.sampling.psis import pareto_k
from pyroboost.weights import log_weights, take_rows

if TYPE_CHECKING:
    from pyroboost.compose.partition import Partition

__all__ = [
    "check_data",
    "combined",
    "draw_rows",
    "in_blocks",
    "is_estimated",
    "label",
    "log_density_of",
    "normalised",
    "sampled_density",
    "support_of",
    "units",
]

_ROWS = 4096  # data at once, where a part gives its density itself
_PARETO_DRAWS = 25


def label(index: int, part: MetaModel) -> str:
    """Return the words by which errors name a part."""
    return f"part {index} ({type(part).__name__})"


def support_of(part: MetaModel) -> str | None:
    """Return the support of a part's visible site in words; ``None`` where it is not known yet.

    It is read from the distribution at the site, in one dry run.
    """
    if isinstance(part, Ratio) or not part.is_program or part.visible_shape is None:
        return None
    with service(part), forked_rng(), poutine.trace() as run, unobserve(part.visible):
        part.model(part.template(1))
    support: Any = getattr(run.trace.nodes[part.visible]["fn"], "support", None)
    while hasattr(support, "base_constraint"):  # events and mixtures of one kind
        support = support.base_constraint
    if support is None:
        return None
    name = str(support).removesuffix("()")
    return {"Boolean": "bits", "Real": "reals", "RealVector": "reals"}.get(name, name)


def check_data(x: Tensor, shape: tuple[int, ...] | None, support: str | None, where: str) -> None:
    """Refuse data that the parts cannot be asked about, in one sentence."""
    if x.dim() < 1 or (shape is not None and tuple(x.shape[1:]) != shape):
        takes = "(N, ...)" if shape is None else f"(N, {', '.join(map(str, shape))})"
        raise ValueError(f"{where}: got data of shape {tuple(x.shape)}; it takes {takes}.")
    if support == "bits" and not is_binary(x):
        raise ValueError(
            f"{where}: the data hold values other than 0 and 1 (or NaN), and the parts model "
            "bits; binarise the data first."
        )
    if x.is_floating_point() and bool(x.isnan().any()):
        raise ValueError(f"{where}: the data hold NaN; drop or fill them first.")


def is_estimated(part: MetaModel) -> bool:
    """Tell whether a part's density is estimated anew at each x, apart from its constant."""
    if isinstance(part, Ratio):
        return False
    with forked_rng():
        found = log_density_of(part, part.template(1), num_samples=2)
    return found.std_error is not None


def log_density_of(
    part: MetaModel, x: Tensor, *, num_samples: int, memory: float = 256.0
) -> Likelihood:
    """Return a part's log density, with the error that is each datum's own.

    An error of the part's constant is left out: in a product it belongs to the product's log Z,
    where it cancels.

    Args:
        part: the part.
        x: data.  # (N, ...)
        num_samples: importance samples per datum, where the part does not know its density.
        memory: bound on their working memory, in MiB.

    Returns:
        Log densities in nats; ``std_error`` is ``None`` where nothing but the constant is
        estimated.  # (N,)
    """
    if isinstance(part, Ratio):
        return in_blocks(part.log_density, x)
    with service(part):
        if part.log_marginal(x[:1]) is not None:
            return _without_constant(in_blocks(part.log_marginal, x))
    return sampled_density(part, x, num_samples=num_samples, memory=memory)


def sampled_density(
    part: MetaModel, x: Tensor, *args: Any, num_samples: int, memory: float = 256.0
) -> Likelihood:
    r"""Return $\log \frac1S \sum_s m(x, h_s) / q(h_s \mid x)$, without the part's constant's error.

    Args:
        part: a meta-model.
        x: data.  # (N, ...)
        *args: further arguments of the part.
        num_samples: importance samples S per datum.
        memory: bound on the working memory, in MiB.

    Returns:
        Estimates in nats, with Pareto k from 25 samples on.  # (N,)
    """
    table = log_weights(part, x, *args, num_samples=num_samples, memory=memory)
    mean, error, ess = log_mean_exp(table)
    k = pareto_k(table) if num_samples >= _PARETO_DRAWS else None
    return Likelihood(mean, "estimate", error, ess, k, num_samples)


def in_blocks(density: Any, x: Tensor, *args: Any) -> Likelihood:
    """Ask for a density of a bounded number of rows at a time."""
    cuts = (slice(start, start + _ROWS) for start in range(0, len(x), _ROWS))
    return Likelihood.cat([density(*take_rows((x, *args), rows, len(x))) for rows in cuts])


def _without_constant(found: Likelihood) -> Likelihood:
    """Take the shared error of a stored log Z out of the errors of the data."""
    if found.kind == "bound":
        raise ValueError(
            "Product: a part gives a bound for its log density, and a bound to a power over a log "
            "Z of bounds is no bound; use parts that are exact or can be estimated."
        )
    error = found.std_error
    if error is None:
        return found
    own = (error.square() - found.shared_error**2).clamp_min(0.0).sqrt()
    rounding = 1e-3 * max(found.shared_error, 1e-6)
    if bool((own <= rounding).all()):
        return Likelihood(found.value, found.kind)
    return Likelihood(found.value, found.kind, own, found.ess, found.pareto_k, found.num_samples)


def combined(found: Sequence[Likelihood], powers: Sequence[float]) -> Likelihood:
    r"""Return $\sum_i a_i \log m_i(x)$, with errors by the delta method.

    Args:
        found: log densities of the parts, from :func:`log_density_of`.
        powers: their powers.

    Returns:
        Log densities of kind ``"unnormalised"``, with the least effective sample size and the
        largest Pareto k of each datum.
    """
    total = sum(a * one.value.double() for one, a in zip(found, powers, strict=True))
    dtype = reduce(torch.promote_types, (one.value.dtype for one in found))
    value = torch.as_tensor(total).to(dtype)
    noisy = [(one, a) for one, a in zip(found, powers, strict=True) if one.std_error is not None]
    if not noisy:
        return Likelihood(value, "unnormalised")
    errors = [a * one.std_error.double() for one, a in noisy if one.std_error is not None]
    sizes = [one.ess for one, _ in noisy if one.ess is not None]
    shapes = [one.pareto_k for one, _ in noisy if one.pareto_k is not None]
    return Likelihood(
        value,
        "unnormalised",
        torch.stack(errors).square().sum(0).sqrt().to(dtype),
        torch.stack(sizes).amin(0) if sizes else None,
        torch.stack(shapes).amax(0) if shapes else None,
        max(one.num_samples for one, _ in noisy),
    )


def normalised(found: Likelihood, partition: Partition) -> Likelihood:
    """Take log Z off log densities that lack it, with its error and its doubts."""
    value = found.value - partition.value
    if found.std_error is None and partition.exact:
        return Likelihood(value, "exact")
    own = torch.zeros_like(value) if found.std_error is None else found.std_error
    return replace(
        found,
        value=value,
        kind="estimate",
        std_error=(own.square() + partition.std_error**2).sqrt(),
        num_samples=found.num_samples or partition.num_samples,
        shared_error=partition.std_error,
        doubt=partition.doubt,
    )


def draw_rows(part: MetaModel, count: int, block: int = 10_000) -> Tensor:
    """Draw samples of a part in blocks of bounded size."""
    sizes = [block] * (count // block) + [count % block] * (count % block > 0)
    return torch.cat([part.sample(size) for size in sizes])


def units(shape: tuple[int, ...] | None) -> int:
    """Return the number of entries of a datum."""
    return 0 if shape is None else math.prod(shape)
