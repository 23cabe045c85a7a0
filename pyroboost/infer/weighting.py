"""A weight for each datum: checked, carried along with the batches, put into the programs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroboost.handlers import is_plate
from pyroboost.sampling import resample

__all__ = ["check_weights", "redrawn", "takes_weights", "weighed", "weighted_rows"]


def check_weights(weights: Any, num_data: int, name: str) -> Tensor:
    """Return weights as a tensor, or say in one sentence what is wrong with them.

    Args:
        weights: one per datum.  # (N,)
        num_data: number of data N.
        name: what the sentence calls them.

    Example:
        >>> check_weights([1.0, 3.0], 2, "weights").tolist()
        [1.0, 3.0]
    """
    weights = torch.as_tensor(weights).detach()
    if weights.shape != (num_data,):
        raise ValueError(
            f"fit: {name} have shape {tuple(weights.shape)} for {num_data} data; pass one number "
            "for each."
        )
    if not weights.is_floating_point():
        weights = weights.to(torch.get_default_dtype())
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError(
            f"fit: {name} hold negative numbers, NaN or infinity; pass finite weights of 0 or "
            "more (exponentials of log weights less their maximum)."
        )
    if not bool(weights.sum() > 0):
        raise ValueError(f"fit: {name} are all 0; at least one datum must count.")
    return weights


def weighted_rows(
    tensors: tuple[Tensor, ...], weights: Any, name: str = "weights"
) -> tuple[tuple[Tensor, ...], Tensor]:
    r"""Leave out rows of weight 0 and scale the others' weights to a mean of 1.

    $$\frac{\sum_n w_n \ell_n}{\sum_n w_n} = \frac1{N'} \sum_{n: w_n > 0} \tilde w_n \ell_n$$

    Args:
        tensors: data, each with N rows.
        weights: one per datum.  # (N,)
        name: what errors call the weights.

    Returns:
        The rows that count, and their weights.  # (N',)

    Example:
        >>> (x,), w = weighted_rows((torch.arange(3.0),), torch.tensor([0.0, 1.0, 3.0]))
        >>> x.tolist(), w.tolist()
        ([1.0, 2.0], [0.5, 1.5])
    """
    weights = check_weights(weights, len(tensors[0]), name)
    on = weights > 0
    weights = weights[on]
    # Twice: the first division keeps tiny weights from underflowing in the mean.
    weights = weights / weights.max()
    weights = weights / weights.mean()
    if not bool(on.all()):
        tensors = tuple(part[on.to(part.device)] for part in tensors)
    return tensors, weights


def redrawn(data: Tensor, weights: Any = None) -> Tensor:
    """Draw as many rows anew in proportion to their weights, for algorithms without weights.

    Each row comes as often as expected, rounded up or down.

    Args:
        data: rows.  # (N, ...)
        weights: one per datum; without them the data are returned as they are.  # (N,)

    Example:
        >>> redrawn(torch.arange(3.0), torch.tensor([0.0, 2.0, 1.0])).sort().values.tolist()
        [1.0, 1.0, 2.0]
    """
    if weights is None:
        return data
    weights = check_weights(weights, len(data), "weights").to(data.device)
    # In the order of the data, weights that alternate can keep step with systematic draws.
    order = torch.randperm(len(data)).to(data.device)
    chosen = resample(weights[order].double().log(), len(data), method="systematic")
    return data[order[chosen]]


def takes_weights(loss: Callable[..., Any]) -> bool:
    """Tell whether a loss has a keyword ``weights`` of its own."""
    try:
        return "weights" in inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return False


class _Weigh(Messenger):
    """Scale every site of a program by the weight of its datum."""

    def __init__(self, weights: Tensor, drawn: set[str], *, draws: bool) -> None:
        super().__init__()
        self.weights, self.drawn, self.draws = weights, drawn, draws
        self.reached = False
        self.plates: frozenset[str] | None = None  # those that may be the plate of the data

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate(msg) or msg["infer"].get("_deterministic"):
            return
        self.reached = True
        count, batch = len(self.weights), tuple(msg["fn"].batch_shape)
        frames = self._frames(msg, count)
        dims = frames or [i - len(batch) for i, size in enumerate(batch) if size == count]
        if frames is None or not dims:
            raise ValueError(
                f"fit: site '{msg['name']}' has no dimension of the {count} data of a batch, so "
                "that a weight per datum has no meaning for it; put it in a plate over the data "
                "or leave the weights out."
            )
        dim = min(dims)
        msg["scale"] = msg["scale"] * self.weights.reshape(-1, *[1] * (-1 - dim))

    def _frames(self, msg: Any, count: int) -> list[int] | None:
        """Return the dims that may be the data's; ``None``: of the right size, but another's.

        The plate of the data holds every site of a program, which tells it from a plate that
        has as many members as the batch by chance.
        """
        sized = [f for f in msg["cond_indep_stack"] if f.vectorized and f.size == count]
        sized = [f for f in sized if f.name != "num_particles_vectorized"]
        if not sized:
            return []
        names = frozenset(f.name for f in sized)
        self.plates = names if self.plates is None else self.plates & names
        return [f.dim for f in sized if f.name in self.plates] or None

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.draws:
            self.drawn.add(msg["name"])
        elif "_enumerate_dim" in msg["infer"] and msg["name"] not in self.drawn:
            raise ValueError(
                f"fit: the model enumerates '{msg['name']}', and its sum over values cannot carry "
                "a weight per datum; write the site's marginal as one distribution (for instance "
                "MixtureSameFamily), or enumerate it in the guide."
            )


def weighed(loss: Callable[..., Tensor], weights: Tensor) -> Callable[..., Tensor]:
    r"""Return a loss in which each datum counts with its weight, $\sum_b w_b \ell_b$.

    A loss with a keyword ``weights`` is given them. For any other, such as a Pyro ELBO, every
    site of model and guide is scaled by the weight of its datum.

    Args:
        loss: ``loss(model, guide, *batch)``, summed over the batch in nats.
        weights: one per row of the batch.  # (B,)

    Raises:
        ValueError: on call, where a site has no dimension of the data, is enumerated in the
            model, or where the loss runs neither program.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> elbo, x = Trace_ELBO().differentiable_loss, torch.zeros(2)
        >>> twice = weighed(elbo, torch.tensor([1.0, 3.0]))(model, lambda x: None, x)
        >>> bool(torch.isclose(twice, 2 * elbo(model, lambda x: None, x)))
        True
    """
    if takes_weights(loss):
        return partial(loss, weights=weights)

    def call(model: Callable[..., Any], guide: Callable[..., Any], *batch: Any) -> Tensor:
        drawn: set[str] = set()
        around = _Weigh(weights, drawn, draws=False), _Weigh(weights, drawn, draws=True)
        value = loss(around[0](model), around[1](guide), *batch)
        if not (around[0].reached or around[1].reached):
            raise ValueError(
                "fit: weights scale the sites of the model and guide that the loss is given, and "
                "this loss reached none; give it a keyword 'weights' or leave them out."
            )
        return value

    return call
