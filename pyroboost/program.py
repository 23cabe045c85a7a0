"""A Pyro program of any make as one ``nn.Module`` that owns its parameters."""

from __future__ import annotations

import copy
import itertools
import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn
from torch.distributions import constraints

from pyroboost._callables import copy_callable, find_modules
from pyroboost.contexts import local_params, pyro_modules

__all__ = ["Program", "first_tensor"]

_serial = itertools.count()
_REAL = (None, constraints.real, constraints.real_vector)
_COPY = re.compile(r"copy\d+\.")


def _register(name: str, tensor: Tensor, constraint: Any = constraints.real) -> None:
    """Enter a module's tensor in the store, where Pyro's optimisers look for names to save by."""
    store = pyro.get_param_store()
    held = store._params.get(name)
    if held is not tensor:
        store._param_to_name.pop(held, None)
        store._constraints[name] = constraint
        store._params[name] = tensor
    # One module may be part of a model and of its guide: one of its names holds, whoever ran last.
    store._param_to_name[tensor] = min(name, store._param_to_name.get(tensor, name))


def _start(init: Tensor | Callable[[], Tensor]) -> Tensor:
    return (init if isinstance(init, Tensor) else init()).detach().clone()


class _Params(Messenger):
    """Answer a program's param statements with tensors that belong to this program alone.

    1. A parameter of one of the program's modules is that module's own tensor, never one that
       another program left in the store under the same name.
    2. A ``PyroParam`` is kept by its module likewise; only its name is made the program's own.
    3. A free ``pyro.param`` lives in the store under its own name; in a copy, under the copy's.
    """

    def __init__(self, program: Program, *, register: bool) -> None:
        super().__init__()
        self.program, self.register = program, register
        self.owned = {id(p) for p in program.parameters()}
        self.seen: set[int] = set()
        self._free: dict[int, str] = {}

    def _pyro_param(self, msg: Any) -> None:
        name, init = msg["args"][0], msg["args"][1] if len(msg["args"]) > 1 else None
        program, real = self.program, msg["kwargs"].get("constraint") in _REAL
        stored = getattr(msg["fn"], "__self__", None) is pyro.get_param_store()
        if isinstance(init, Tensor) and id(init) in self.owned and real:
            msg["name"] = f"{program.owner}.{name}"
            msg["value"] = init
        elif not stored:
            msg["name"] = f"{program.owner}.{name}"
        elif msg["value"] is None:
            msg["name"] = program.scope + name
            if init is not None and not isinstance(init, nn.Parameter):
                # Pyro would train the very tensor that it starts from, for all who start from it.
                msg["args"] = (name, partial(_start, init), *msg["args"][2:])
            self._free[id(msg)] = name
        # The store reads its key from the arguments. A name alone must stay alone: Pyro reads it
        # as "get what is there".
        msg["args"] = (msg["name"], *msg["args"][1:])

    def _pyro_post_param(self, msg: Any) -> None:
        if id(msg) in self._free:
            msg["value"] = self.program.reach(self._free.pop(id(msg)), msg["name"])
            return
        value = msg["value"]
        if isinstance(value, nn.Parameter):
            value.unconstrained = weakref.ref(value)  # type: ignore[attr-defined]
        if hasattr(value, "unconstrained"):
            held = value.unconstrained()
            self.seen.add(id(held))
            if self.register:
                _register(msg["name"], held, msg["kwargs"].get("constraint", constraints.real))


def _autoguides(fn: Any) -> list[Any]:
    """Return the guides within a callable that run their model on their first call."""
    from pyro.infer.autoguide import AutoGuide

    parts = (part for top in find_modules(fn) for part in top.modules())
    return [part for part in parts if isinstance(part, AutoGuide)]


class Program(nn.Module):
    """One Pyro program, model or guide, as a module that owns its parameters.

    Every ``nn.Module`` that the program is, belongs to, or refers to by closure or global name is
    part of it: ``parameters()``, ``to()``, ``state_dict()`` and ``copy.deepcopy`` reach it. Freeze
    what must not be trained by ``requires_grad_(False)``. Values of free ``pyro.param`` statements
    are part of the state as well.

    In Pyro's ordinary mode all of them are announced as params, so that ``SVI`` trains plain
    modules too; with ``module_local_params`` nothing is announced and nothing is paid.

    Args:
        fn: a function, a bound method, an ``nn.Module`` or a ``PyroModule``.
        label: what the program is to its meta-model: ``"model"`` or ``"guide"``.
    """

    def __init__(self, fn: Callable[..., Any], label: str = "program") -> None:
        super().__init__()
        if not callable(fn):
            raise TypeError(
                f"Program: the {label} is {type(fn).__name__}, which cannot be called; pass a "
                "Pyro function or module."
            )
        self.label = label
        self.fn = fn
        self._lazy = bool(_autoguides(fn))
        if parts := [part for part in find_modules(fn) if part is not fn]:
            self.parts = nn.ModuleList(parts)
        self.owner = f"{label}{next(_serial)}"
        self.scope = ""
        # Free params that have been reached: their names in the store by their own.
        self.free: dict[str, str] = {}
        # Values of those that have not been reached yet: what was loaded for them, and what the
        # original's store held when this copy was made.
        self.pending: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        if self._lazy:
            self._set_up(args, kwargs)
        announced = not pyro.settings.get("module_local_params") and am_i_wrapped()
        with pyro_modules(self), local_params(), _Params(self, register=announced) as params:
            result = self.fn(*args, **kwargs)
        if announced:
            for name, parameter in self.named_parameters():
                if id(parameter) not in params.seen and parameter.requires_grad:
                    self._announce(f"{self.owner}.{name}", parameter)
        return result

    def _set_up(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let guides that look at a ``PyroModule`` on their first call do so in Pyro's own mode.

        They hide the model from their modules, so that nobody prepares it for local parameters.
        """
        waiting = [guide for guide in _autoguides(self.fn) if guide.prototype_trace is None]
        models = (top for guide in waiting for top in find_modules(guide.model))
        if any(isinstance(part, PyroModule) for top in models for part in top.modules()):
            store = pyro.get_param_store()
            before = set(store.keys())
            with pyro.settings.context(module_local_params=False), pyro.poutine.block():
                self.fn(*args, **kwargs)
            for name in set(store.keys()) - before:  # a fit leaves the store as it was
                store._param_to_name.pop(store._params.pop(name), None)
                store._constraints.pop(name, None)
        self._lazy = any(guide.prototype_trace is None for guide in waiting)

    @staticmethod
    def _announce(name: str, parameter: nn.Parameter) -> None:
        parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
        _register(name, parameter)
        kwargs = {"constraint": constraints.real, "event_dim": None}  # as pyro.param has them
        effectful(type="param")(lambda *_, **__: parameter)(name, parameter, name=name, **kwargs)

    def reach(self, name: str, final: str) -> Tensor:
        """Return the value of a free param; what was loaded or copied for it comes first."""
        store = pyro.get_param_store()
        first, self.free[name] = name not in self.free, final
        start = self.start.pop(name, None) if first else None
        kept = self.pending.pop(name, start)
        if kept is not None:
            self._restore(name, final, kept)
        return store[final]

    @staticmethod
    def _restore(name: str, final: str, kept: Tensor) -> None:
        held = pyro.get_param_store()[final].unconstrained()
        if held.shape != kept.shape:
            raise ValueError(
                f"param '{name}' has shape {tuple(held.shape)}, and {tuple(kept.shape)} in the "
                "state that was loaded."
            )
        with torch.no_grad():
            held.copy_(kept)

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the unconstrained values of free params by their own names.

        Before the first run nobody knows which of the store's params are this program's; then
        all of those are kept that may be.
        """
        store = pyro.get_param_store()._params
        reached = {name: store[final] for name, final in self.free.items() if final in store}
        known = reached if self.free else {**self._unclaimed(), **self.start}
        return {name: value.detach().clone() for name, value in {**known, **self.pending}.items()}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Give free params their values back, now or when they are first reached."""
        if missing := sorted(set(self.free) - set(state)):
            raise ValueError(f"the state lacks the params {missing} of the {self.label}.")
        store = pyro.get_param_store()
        for name, value in state.items():
            final = self.free.get(name, "")
            if final in store:
                self._restore(name, final, value)
            elif final or not self.free:
                self.pending[name] = value.detach().clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Program:
        """Move free params with the rest, so that ``to()`` and ``double()`` reach them."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        store = pyro.get_param_store()._params
        for final in self.free.values():
            if (held := store.get(final)) is not None:
                held.data = fn(held.data)
                if held.grad is not None:
                    held.grad.data = fn(held.grad.data)
        for values in (self.pending, self.start):
            values.update({name: fn(value) for name, value in values.items()})
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = dict(self.__dict__)
        fn = state.pop("fn", None)
        new.__dict__.update(copy.deepcopy(state, memo))
        if fn is not None:
            new.__dict__["fn"] = copy_callable(fn, memo)
        serial = next(_serial)
        # One scope for all programs of one copy: a param that model and guide share stays shared.
        scopes = memo.setdefault(id(_serial), {})
        new.owner, new.free = f"{self.label}{serial}", {}
        new.scope = scopes.setdefault(self.scope, f"copy{serial}.")
        new.start, new.pending = self.get_extra_state(), {}
        self._check_apart(new)
        return new

    def _unclaimed(self) -> dict[str, Tensor]:
        """Return the params in this program's scope that belong to no module."""
        store = pyro.get_param_store()._params
        names = {name[len(self.scope) :]: name for name in store if name.startswith(self.scope)}
        return {
            name: store[final]
            for name, final in names.items()
            if not isinstance(store[final], nn.Parameter) and not _COPY.match(name)
        }

    def _check_apart(self, new: Program) -> None:
        mine = {id(p) for module in find_modules(self.fn) for p in module.parameters()}
        for module in find_modules(new.fn):
            for name, parameter in module.named_parameters():
                if id(parameter) in mine:
                    raise TypeError(
                        f"deepcopy: the copy of the {self.label} would still train the original's "
                        f"'{name}'; write the {self.label} as an nn.Module that holds its networks."
                    )

    def extra_repr(self) -> str:
        """Name the function that this program runs."""
        fn = self.__dict__.get("fn")
        return "" if fn is None else getattr(fn, "__qualname__", type(fn).__name__)


def first_tensor(module: nn.Module) -> Tensor | None:
    """Return a tensor that tells the dtype and the device of a module with programs in it."""
    store = pyro.get_param_store()._params
    programs = (part for part in module.modules() if isinstance(part, Program))
    free = (store.get(name) for program in programs for name in program.free.values())
    return next(module.parameters(), next((value for value in free if value is not None), None))
