"""What traces of a program tell: densities per datum, and which latents stand above a site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.inspect import get_dependencies
from torch import Tensor

__all__ = ["data_plates", "datum_log_prob", "latent_parents"]


def data_plates(site: dict[str, Any], num_data: int) -> frozenset[str]:
    """Return the names of the plates of N around a site.

    Around the hidden site they tell the plate of the data from one of equal size within it.

    Args:
        site: a node of a trace, or a message.
        num_data: the number of data N.
    """
    stack = site["cond_indep_stack"]
    return frozenset(f.name for f in stack if f.vectorized and f.size == num_data)


def datum_log_prob(
    site: dict[str, Any], num_data: int, plates: frozenset[str] = frozenset()
) -> Tensor:
    """Sum a traced site's unscaled log density to one value per datum.

    The data are the plate of ``num_data``, or the leftmost batch dimension of that size.

    Args:
        site: a node of a trace after ``compute_log_prob``.
        num_data: the number of data N.
        plates: names of the plates that may be that of the data, where a site has one of them;
            what :func:`data_plates` says of the hidden site.

    Returns:
        Log density per datum in nats.  # (N,)

    Raises:
        ValueError: the site has no dimension of the data's size.
    """
    log_prob: Tensor = site["unscaled_log_prob"]
    mask = site["mask"]
    if mask is not None:
        on = torch.as_tensor(mask, device=log_prob.device)
        log_prob = torch.where(on, log_prob, log_prob.new_zeros(()))
    sized = [f for f in site["cond_indep_stack"] if f.vectorized and f.size == num_data]
    frames = [f.dim for f in sized if f.name in plates] or [f.dim for f in sized]
    shape = log_prob.shape
    dims = [d for d in frames if -d <= len(shape) and shape[d] == num_data] or [
        i - len(shape) for i, size in enumerate(shape) if size == num_data
    ]
    if not dims:
        raise ValueError(
            f"site '{site['name']}' has log densities of shape {tuple(shape)} without a dimension "
            f"of the {num_data} data; put it in a plate over the data."
        )
    return log_prob.movedim(min(dims), 0).reshape(num_data, -1).sum(-1)


def latent_parents(
    model: Callable[..., Any], site: str, *args: Any, around: str | None = None
) -> list[str]:
    """Return the latent sites on which a latent site directly depends.

    Args:
        model: a Pyro program; it runs once.
        site: the latent site.
        *args: the program's arguments.
        around: another site; then only parents count from which it can be reached past ``site``.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
        ...     b = pyro.sample("b", dist.Normal(a, 1.0))
        ...     return pyro.sample("c", dist.Normal(b, 1.0))
        >>> latent_parents(model, "b"), latent_parents(model, "b", around="c")
        (['a'], [])
    """
    graph = get_dependencies(model, args)["prior_dependencies"]
    parents = set(graph.get(site, {})) - {site}
    if around is None or not parents:
        return sorted(parents)
    above = {around}  # what `around` depends on, on paths that do not pass through `site`
    waiting = [around]
    while waiting:
        new = set(graph.get(waiting.pop(), {})) - above - {site}
        above |= new
        waiting.extend(new)
    ancestors, waiting = set(parents), list(parents)
    while waiting:
        new = set(graph.get(waiting.pop(), {})) - ancestors
        ancestors |= new
        waiting.extend(new)
    return sorted(parents) if ancestors & above else []
