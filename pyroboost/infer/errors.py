"""What fits and boosters raise, and the search for the site that spoilt a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyroboost.contexts import local_params
from pyroboost.handlers import is_plate
from pyroboost.metamodel import MetaModel

__all__ = [
    "CheckpointError",
    "FitError",
    "NonFiniteLoss",
    "check_composition",
    "check_unweighted",
    "find_non_finite",
    "is_numerical",
]


class FitError(RuntimeError):
    """A fit cannot go on."""


class CheckpointError(FitError):
    """A checkpoint does not belong to this fit or cannot be read."""


class NonFiniteLoss(FitError):
    """NaN or infinity in the loss, a gradient or the held-out bound.

    Args:
        message: one sentence.
        epoch: the epoch, from 1.
        batch: the batch of that epoch, from 1; of the held-out data if ``held_out``.
        site: the first site, parameter or tensor that is not finite; ``None`` if none was found.
        held_out: whether it was the held-out bound.
    """

    def __init__(
        self, message: str, *, epoch: int, batch: int, site: str | None, held_out: bool = False
    ) -> None:
        super().__init__(message)
        self.epoch, self.batch, self.site, self.held_out = epoch, batch, site, held_out


def check_composition(booster: str, composition: object, kind: type[MetaModel]) -> None:
    """Refuse to boost what is no composition of the booster's kind.

    Args:
        booster: the function's name.
        composition: what came.
        kind: what the function grows.
    """
    if not isinstance(composition, kind):
        what = "the meta-models" if not isinstance(composition, MetaModel) else "it"
        raise TypeError(
            f"{booster}: got {type(composition).__name__}, not a {kind.__name__}; wrap {what} in "
            f"{kind.__name__}(...)."
        )


def check_unweighted(booster: str, *settings: Mapping[str, Any]) -> None:
    """Refuse weights of data among the settings of a booster whose rounds make their own.

    Args:
        booster: the function's name.
        *settings: settings of all rounds, and of single ones.
    """
    for name in ("weights", "validation_weights"):
        if any(name in one for one in settings):
            raise TypeError(
                f"{booster}: got {name}=, and its rounds make their own weights of data; leave it "
                "out and pass data drawn in proportion to them."
            )


def is_finite(tensor: Any) -> bool:
    """Tell whether all numbers of a tensor are finite; what is no float tensor is."""
    return (
        not isinstance(tensor, Tensor)
        or not tensor.is_floating_point()
        or bool(torch.isfinite(tensor.detach()).all())
    )


def _bad_site(trace: Any) -> tuple[str, str] | None:
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or is_plate(node):
            continue
        if not is_finite(node["value"]):
            return name, f"the value of site '{name}'"
        # One site at a time: a later one may raise for the NaN that an earlier one made.
        trace.compute_log_prob(lambda key, _, name=name: key == name)
        if not is_finite(node["log_prob"]):
            return name, f"the log density of site '{name}'"
    return None


_NUMERICAL = (
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]  # public, but its stub is not
    ArithmeticError,
    NonFiniteLoss,
)
_REFUSALS = ("to satisfy the constraint", "to be within the support")  # torch's validation


def is_numerical(error: BaseException | None) -> bool:
    """Tell whether an error comes from the numbers of a draw rather than from a program.

    These are a value or parameter that a distribution refuses, a matrix without a decomposition,
    what is not finite, and Pyro's errors that were raised from one of them.

    Example:
        >>> import pyro.distributions as dist
        >>> try:
        ...     dist.Normal(0.0, torch.tensor(-1.0), validate_args=True)
        ... except ValueError as error:
        ...     print(is_numerical(error), is_numerical(ValueError("shapes differ")))
        True False
    """
    while error is not None:
        if isinstance(error, _NUMERICAL):
            return True
        if isinstance(error, ValueError) and any(words in str(error) for words in _REFUSALS):
            return True
        error = error.__cause__
    return False


def find_non_finite(
    pair: MetaModel, trainable: Mapping[str, Tensor], batch: tuple[Tensor, ...]
) -> tuple[str, str] | None:
    """Look for the first number that is not finite: the batch, parameters, guide, model.

    The programs are run once more, without validation, from the present random state; set that
    to what it was before the failed run to see the same draws.

    Returns:
        Its name and a description, or ``None`` where everything is finite.
    """
    for place, part in enumerate(batch):
        if not is_finite(part):
            return f"batch[{place}]", f"tensor {place} of the batch itself"
    for name, tensor in trainable.items():
        if not is_finite(tensor):
            return name, f"parameter '{name}', spoilt by the gradient of the step before,"
    with torch.no_grad(), local_params(), pyro.validation_enabled(False):
        guide = poutine.trace(pair.guide).get_trace(*batch)
        found = _bad_site(guide)
        if found is None:
            model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(*batch)
            found = _bad_site(model)
    return found
