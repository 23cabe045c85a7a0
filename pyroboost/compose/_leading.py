"""Whether a stage may be given values with leading dimensions: particles, enumerated values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pyroboost.contexts import forked_rng, service
from pyroboost.handlers import capture, given, is_plate, unobserve
from pyroboost.metamodel import MetaModel

__all__ = ["check_leading"]


class _values(Messenger):
    """Record the value of every site, those that a trace leaves out included."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        self.by_name[msg["name"]] = msg["value"]


class _part(Messenger):
    """Give the sites of a run on one part the values that they had in the run on all parts."""

    def __init__(self, whole: dict[str, Tensor], row: int) -> None:
        super().__init__()
        self.whole, self.row = whole, row

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate(msg) or msg["is_observed"]:
            return
        value, shape = self.whole[msg["name"]], msg["fn"].shape()
        if value.shape == (2, *shape):
            value = value[self.row]
        if value.shape != shape:
            raise ValueError(f"'{msg['name']}' has shape {tuple(value.shape)}")
        msg["value"] = value


@contextmanager
def _norms(stage: nn.Module) -> Iterator[dict[nn.Module, set[int]]]:
    """Record how many dimensions the inputs of normalising layers have.

    Fresh running statistics are 0 and 1 and hide which dimension a layer normalises.
    """
    dims: dict[nn.Module, set[int]] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        dims.setdefault(module, set()).add(inputs[0].dim())

    layers = [module for module in stage.modules() if isinstance(module, _NormBase)]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield dims
    finally:
        for hook in hooks:
            hook.remove()


def _apart_and_together(run: Callable[[Tensor], capture], stack: Tensor) -> tuple[Tensor, Tensor]:
    with _values() as whole:
        together = run(stack)
    assert together.msg is not None
    value = together.value
    apart = []
    for row in range(len(stack)):
        with _part(whole.by_name, row):
            site = run(stack[row])
        assert site.msg is not None
        apart.append(site.msg["fn"].log_prob(value[row]))
    both: Tensor = together.msg["fn"].log_prob(value)
    return torch.stack(apart), both


def check_leading(
    stage: MetaModel,
    name: str,
    *,
    template: Tensor,
    args: Sequence[Any],
    visible: Tensor | None = None,
    hidden: Tensor | None = None,
    within: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Refuse a stage whose programs give other numbers when values carry leading dimensions.

    Vectorised particles and enumeration add dimensions on the left; a program that reads its
    number of data from ``len(x)``, or a batch norm on three dimensions, fails or, worse, does not.

    Args:
        stage: the stage.
        name: how errors name it.
        template: its visible template.  # (N, ...)
        args: its further arguments.
        visible: visible values for its guide.  # (L, N, ...)
        hidden: hidden values for its model.  # (L, N, ...)
        within: a context in which its programs run.
    """

    def encode(value: Tensor) -> capture:
        with capture(stage.hidden) as site:
            stage.guide(value, *args)
        return site

    def decode(value: Tensor) -> capture:
        with capture(stage.visible) as site, unobserve(stage.visible):
            given(stage.model, {stage.hidden: value})(template, *args)
        return site

    run, values = (encode, visible) if hidden is None else (decode, hidden)
    assert values is not None
    stack = values[:2] if len(values) > 1 else values.expand(2, *values.shape[1:])
    try:
        with service(stage), forked_rng(), within(), _norms(stage) as dims:
            apart, together = _apart_and_together(run, stack)
        same = together.shape == apart.shape and torch.allclose(together, apart, 1e-3, 1e-3)
    except (RuntimeError, ValueError, IndexError) as error:
        raise _cannot_lead(name, str(error).strip().splitlines()[0]) from error
    if not same:
        raise _cannot_lead(name, "log densities differ from those of the parts")
    for layer, seen in dims.items():
        if len(seen) > 1:
            raise _cannot_lead(name, f"{type(layer).__name__} would normalise another dimension")


def _cannot_lead(name: str, reason: str) -> ValueError:
    return ValueError(
        f"Cascade: {name} cannot take values with leading dimensions ({reason}); run particles one "
        "by one (vectorize_particles=False, parallel=False) or count data from the right."
    )
