"""The ordinary problems that rounds of multiplicative boosting consist of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pyroboost.compose._line_search import tempered
from pyroboost.compose.densities import log_density_of
from pyroboost.compose.energy import Ratio
from pyroboost.metamodel import MetaModel, Round
from pyroboost.sampling import effective_sample_size

if TYPE_CHECKING:
    from pyroboost.compose.product import Product

__all__ = ["check_tensors", "contrast", "data_weights", "ess_of", "in_turn", "reweighted"]


def check_tensors(*data: object) -> None:
    """Refuse data that cannot be weighed, in one sentence."""
    for one in data:
        if not (one is None or isinstance(one, Tensor)):
            raise TypeError(
                f"rounds: got data as {type(one).__name__}; rounds that weigh data need one tensor "
                "(N, ...)."
            )


def data_weights(log_density: Tensor, beta: float, least: float = 0.0) -> tuple[Tensor, float]:
    r"""Return weights $\propto \tilde q(x_n)^{-\beta}$ of mean 1, and the $\beta$ that they have.

    Args:
        log_density: $\log \tilde q(x_n)$, up to a constant.  # (N,)
        beta: how much of the ratio of data to model is made up for, within [0, 1].
        least: effective sample size of the weights at least, as a share of N; where it would be
            less, $\beta$ is lowered until it is not.

    Returns:
        The weights, in double precision, and the exponent.

    Raises:
        ValueError: an option is out of its range, or a datum has density 0 or NaN.

    Example:
        >>> weights, beta = data_weights(torch.tensor([-1.0, -3.0]), 1.0)
        >>> round(float(weights[1] / weights[0]), 3), beta
        (7.389, 1.0)
    """
    if not (0.0 <= beta <= 1.0 and 0.0 <= least < 1.0):
        raise ValueError(
            f"rounds: beta is {beta} and least {least}; take both within [0, 1], least below 1."
        )
    if not bool(log_density.isfinite().all()):
        raise ValueError(
            "rounds: some data have density 0 or NaN under the product so far, so that no weight "
            "is finite; train the earlier parts on all the data."
        )
    found = tempered(beta * log_density.double(), least)
    return found.weights, beta * found.beta


def reweighted(
    part: MetaModel,
    name: str,
    data: Tensor,
    validation: Tensor | None,
    *,
    log_density: Tensor,
    validation_log_density: Tensor | None,
    beta: float,
    least: float,
) -> tuple[Round, float]:
    """Return the problem of a generative round, and the beta that its weights have.

    Args:
        part: the meta-model to be fitted.
        name: what the round is called.
        data: training data.  # (N, ...)
        validation: held-out data.  # (M, ...)
        log_density: log density of the training data under the product so far.  # (N,)
        validation_log_density: the same of the held-out data.  # (M,)
        beta: see :func:`data_weights`.
        least: likewise.
    """
    weights, beta = data_weights(log_density, beta, least)
    held_out = None
    if validation is not None and validation_log_density is not None:
        held_out, _ = data_weights(validation_log_density, beta)
    return Round(part, data, validation, name, None, weights, held_out), beta


def contrast(
    product: Product,
    ratio: Ratio,
    name: str,
    data: Tensor,
    validation: Tensor | None,
    *,
    most: int = 10_000,
) -> Round:
    """Return the problem of a discriminative round: data against draws of the product so far.

    Args:
        product: the product so far.
        ratio: the part whose classifier is to be trained.
        name: what the round is called.
        data: training data, label 1.  # (N, ...)
        validation: held-out data.  # (M, ...)
        most: draws of the product at most; as many as there are data if those are fewer.
    """
    ratio.visible_shape = tuple(data.shape[1:])
    sets: list[tuple[Tensor, Tensor] | None] = []
    for real in (data, validation):
        if real is None:
            sets.append(None)
            continue
        made = product.sample(min(len(real), most)).to(real)
        labels = torch.cat([torch.ones(len(real)), torch.zeros(len(made))]).to(real.device)
        sets.append((torch.cat([real, made]), labels.to(torch.get_default_dtype())))
    return Round(ratio.problem(), sets[0], sets[1], name)


def ess_of(weights: Tensor | None) -> float:
    """Return the effective sample size of data weights; NaN where there are none."""
    return math.nan if weights is None else float(effective_sample_size(weights.log()))


def in_turn(
    product: Product, data: Any, validation: Any, *, beta: float, least: float
) -> Iterator[Round]:
    """Yield one round per part; see :meth:`Product.rounds`."""
    total: list[Tensor | float] = [0.0, 0.0]
    for index, part in enumerate(product):
        name = f"{index}.{type(part).__name__}"
        if index == 0:
            yield Round(part, data, validation, name)
        else:
            check_tensors(data, validation)
            before = product[:index]
            if isinstance(part, Ratio):
                yield contrast(before, part, name, data, validation)
            else:
                log_density, held_out = (cast(Tensor, t) for t in total)
                yield reweighted(
                    part,
                    name,
                    data,
                    validation,
                    log_density=log_density,
                    validation_log_density=held_out,
                    beta=beta,
                    least=least,
                )[0]
        if index + 1 < len(product) and isinstance(data, Tensor):
            part.refresh()
            for place, rows in enumerate((data, validation)):
                if rows is not None:
                    found = log_density_of(part, rows, num_samples=product.num_samples)
                    total[place] = total[place] + product.powers[index] * found.value.double()
