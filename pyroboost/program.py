"""A Pyro program of any make as one ``nn.Module`` that owns its parameters."""

from __future__ import annotations

import copy
import itertools
import re
import weakref
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from pyroboost._callables import copy_callable, find_modules, find_strings
from pyroboost.contexts import local_params

__all__ = ["Program"]

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
            msg["name"] = final = program.scope + name
            start = program.take(name)
            if start is not None and final not in pyro.get_param_store():
                msg["args"] = (name, start, *msg["args"][2:])
            self._free[id(msg)] = name
        # The store reads its key from the arguments. A name alone must stay alone: Pyro reads it
        # as "get what is there".
        msg["args"] = (msg["name"], *msg["args"][1:])

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        if id(msg) in self._free:
            self.program.free[self._free.pop(id(msg))] = msg["name"]
            return
        if isinstance(value, nn.Parameter):
            value.unconstrained = weakref.ref(value)  # type: ignore[attr-defined]
        if hasattr(value, "unconstrained"):
            held = value.unconstrained()
            self.seen.add(id(held))
            if self.register:
                _register(msg["name"], held, msg["kwargs"].get("constraint", constraints.real))


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
        if not isinstance(fn, nn.Module):
            self.parts = nn.ModuleList(find_modules(fn))
        self.owner = f"{label}{next(_serial)}"
        self.scope = ""
        self.free: dict[str, str] = {}
        # Values of free params that have not been reached yet: loaded ones, and, in a copy, what
        # the original's store held.
        self.pending: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        announced = not pyro.settings.get("module_local_params") and am_i_wrapped()
        with local_params(), _Params(self, register=announced) as params:
            result = self.fn(*args, **kwargs)
        if announced:
            for name, parameter in self.named_parameters():
                if id(parameter) not in params.seen and parameter.requires_grad:
                    self._announce(f"{self.owner}.{name}", parameter)
        return result

    @staticmethod
    def _announce(name: str, parameter: nn.Parameter) -> None:
        parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
        _register(name, parameter)
        kwargs = {"constraint": constraints.real, "event_dim": None}  # as pyro.param has them
        effectful(type="param")(lambda *_, **__: parameter)(name, parameter, name=name, **kwargs)

    def take(self, name: str) -> Tensor | None:
        """Return the value from which a free param starts that is reached for the first time."""
        start = self.start.pop(name, None)
        return self.pending.pop(name, start)

    def _known(self) -> dict[str, str]:
        """Return the free params in the store by their own names; before a run, those spelt out."""
        store = pyro.get_param_store()
        names = dict(self.free)
        if not self.free:
            names = {name: self.scope + name for name in sorted(find_strings(self.fn))}
        return {name: final for name, final in names.items() if final in store}

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the constrained values of the program's free params by their own names."""
        store = pyro.get_param_store()
        values = {name: store[final].detach().clone() for name, final in self._known().items()}
        return {**self.pending, **values}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Give free params their values back, now or when they are first reached."""
        store = pyro.get_param_store()
        if self.free and set(state) != set(self.free):
            raise ValueError(
                f"the {self.label} has the params {sorted(self.free)}, the state {sorted(state)}."
            )
        for name, value in state.items():
            final = self.free.get(name, self.scope + name)
            if final not in store:
                self.pending[name] = value.detach().clone()
                continue
            held = store[final].unconstrained()
            if store[final].shape != value.shape:
                raise ValueError(
                    f"param '{name}' has shape {tuple(store[final].shape)}, and "
                    f"{tuple(value.shape)} in the state."
                )
            with torch.no_grad():
                held.copy_(transform_to(store._constraints[final]).inv(value.to(held)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Program:
        """Move free params with the rest, so that ``to()`` and ``double()`` reach them."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        store = pyro.get_param_store()
        for final in self._known().values():
            held = store[final].unconstrained()
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
        new.start, new.pending = {**self.start, **self._free_values()}, self.get_extra_state()
        self._check_apart(new)
        return new

    def _free_values(self) -> dict[str, Tensor]:
        """Return all values in this program's scope: some may belong to params not yet reached."""
        store = pyro.get_param_store()
        names = {name[len(self.scope) :]: name for name in store if name.startswith(self.scope)}
        return {
            name: store[final].detach().clone()
            for name, final in names.items()
            if not isinstance(store._params[final], nn.Parameter) and not _COPY.match(name)
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
