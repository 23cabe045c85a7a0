"""Transforms of Pyro and torch as steps of a flow."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Transform

__all__ = ["Borrowed"]

NO_INVERSE = {
    "BlockAutoregressive": "has no inverse in closed form",
    "NeuralAutoregressive": "has no inverse in closed form",
    "Planar": "has no inverse in closed form",
    "Polynomial": "has no inverse in closed form",
    "Radial": "has no inverse in closed form",
    "Sylvester": "has no inverse in closed form",
    "BatchNorm": "normalises by its batch, so its inverse depends on what else is scored",
}
SLOW = {"AffineAutoregressive", "SplineAutoregressive"}


class Borrowed(nn.Module):
    """A transform of Pyro or torch as a step: both directions, each with its log-determinant.

    Pyro's transforms remember their last input and output by identity. That memory is emptied
    after every call here: with it a deep copy fails and a missing inverse goes unnoticed.

    Args:
        transform: a transform of numbers or vectors, or a conditional one of Pyro.
        context: width of the context, for a conditional transform.

    Raises:
        ValueError: if it is of matrices, or does not map all vectors to all vectors.
    """

    def __init__(self, transform: Transform | ConditionalTransform, *, context: int = 0) -> None:
        super().__init__()
        self.label = _kind(transform)
        self.conditional = isinstance(transform, ConditionalTransform)
        self.dim: int | None = getattr(transform, "input_dim", None)
        self.context = context if self.conditional else 0
        self.slow = self.label in SLOW
        self.tried = self.slow  # whether there and back has been seen to work
        # An inverse is no module: what it inverts is, and holds the parameters.
        self.reverse = type(transform).__name__ == "_InverseTransform"
        self.transform = transform.inv if self.reverse else transform
        if self.conditional and not context:
            raise ValueError(
                f"Flow: step {self.label} depends on a context; pass its width as context=."
            )
        if not self.conditional:
            _check_spaces(self.label, transform)

    @property
    def refusal(self) -> str | None:
        """Why this step cannot be inverted, if so."""
        return NO_INVERSE.get(self.label)

    def push(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the step forwards: return y and log |det dy/dx|."""
        return self._push(x, context)

    def pull(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the step backwards: return x and log |det dx/dy|."""
        return self._pull(y, context)

    def _push(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, inverse=False)

    def _pull(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.refusal is not None:
            raise ValueError(f"Flow.inverse: step {self.label} {self.refusal}.")
        return self._run(y, context, inverse=True)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        transform: Any = self.transform
        if self.conditional:
            transform = transform.condition(context)
        used = transform.inv if inverse != self.reverse else transform
        y = used(x)
        log_det = used.log_abs_det_jacobian(x, y)
        if used.domain.event_dim == 0:
            log_det = (torch.zeros_like(x) + log_det).sum(-1)
        _forget(self.transform)
        return y, log_det.expand(y.shape[:-1])


def _kind(transform: Any) -> str:
    """Name the family of a transform, whichever way round it is and conditional or not."""
    name = type(transform).__name__
    if name in ("_InverseTransform", "_ConditionalInverseTransformModule"):
        return _kind(transform.inv)
    return name.removeprefix("Conditional")


def _check_spaces(label: str, transform: Transform) -> None:
    for side in ("domain", "codomain"):
        space: Any = getattr(transform, side)
        base = getattr(space, "base_constraint", space)
        if space.event_dim > 1 or type(base).__name__ != "_Real":
            raise ValueError(
                f"Flow: the {side} of step {label} is {space}; give a transform of all real "
                "vectors to all real vectors."
            )


def _forget(transform: Any) -> None:
    """Empty the memory of a transform and of those within it."""
    inner = transform.modules() if isinstance(transform, nn.Module) else ()
    for part in {id(p): p for p in (transform, *inner)}.values():
        for name in [n for n in vars(part) if n.startswith("_cache") and n != "_cache_size"]:
            setattr(part, name, (None, None) if name == "_cached_x_y" else None)
