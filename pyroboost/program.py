"""A Pyro program of any make as one ``nn.Module`` that owns its parameters."""

from __future__ import annotations

import copy
import functools
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn

from pyroboost.contexts import local_params

__all__ = ["Program"]

_serial = itertools.count()
_LIBRARIES = {"torch", "pyro", "numpy", "math", "builtins"}


def _code_names(code: types.CodeType) -> Iterator[str]:
    """Yield the global names that a function and the functions within it mention."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code_names(constant)


def _references(fn: Any) -> Iterator[Any]:
    """Yield the objects that a callable refers to: its owner, closure, defaults and globals."""
    if isinstance(fn, functools.partial):
        yield from (fn.func, *fn.args, *fn.keywords.values())
    elif isinstance(fn, types.MethodType):
        yield fn.__self__
    elif isinstance(fn, types.FunctionType):
        if (fn.__module__ or "").split(".")[0] in _LIBRARIES:
            return
        for cell in fn.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a variable of the enclosing function that is not yet set
                continue
        yield from fn.__defaults__ or ()
        yield from (fn.__kwdefaults__ or {}).values()
        for name in _code_names(fn.__code__):
            if name in fn.__globals__:
                yield fn.__globals__[name]
    elif isinstance(fn, list | tuple):
        yield from fn
    elif isinstance(fn, dict):
        yield from fn.values()
    elif type(fn).__module__.split(".")[0] not in _LIBRARIES and hasattr(fn, "__dict__"):
        yield from vars(fn).values() if not isinstance(fn, type | types.ModuleType) else ()


def find_modules(fn: Any) -> list[nn.Module]:
    """Return every ``nn.Module`` that a callable refers to, outermost first."""
    found: list[nn.Module] = []
    seen: set[int] = set()

    def visit(item: Any) -> None:
        if id(item) in seen:
            return
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found.append(item)
        else:
            for reference in _references(item):
                visit(reference)

    visit(fn)
    inner = {id(child) for module in found for child in module.modules() if child is not module}
    return [module for module in found if id(module) not in inner]


def copy_callable(fn: Any, memo: dict[int, Any]) -> Any:
    """Deep-copy a callable together with the modules that it refers to.

    Python's ``deepcopy`` returns functions as they are, so that a copy would train the original's
    networks: functions that reach a module are rebuilt around the copied module.
    """
    if id(fn) in memo:
        return memo[id(fn)]
    if not isinstance(fn, types.FunctionType):
        return copy.deepcopy(fn, memo)
    if not find_modules(fn):
        return fn
    names = set(_code_names(fn.__code__)) & set(fn.__globals__)
    replaced = {n: fn.__globals__[n] for n in names if find_modules(fn.__globals__[n])}
    scope = fn.__globals__ if not replaced else dict(fn.__globals__)
    cells = tuple(types.CellType() for _ in fn.__closure__ or ())
    new = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, cells or None)
    new.__kwdefaults__, new.__dict__ = fn.__kwdefaults__, dict(fn.__dict__)
    memo[id(fn)] = new  # before its references: functions may refer to each other
    for cell, old in zip(cells, fn.__closure__ or (), strict=True):
        try:
            contents = old.cell_contents
        except ValueError:
            continue
        cell.cell_contents = copy_callable(contents, memo) if find_modules(contents) else contents
    if replaced:
        scope.update({n: copy_callable(value, memo) for n, value in replaced.items()})
    return new


def _register(name: str, parameter: nn.Parameter) -> None:
    """Enter a module's tensor in the store, where Pyro's optimisers look for names to save by."""
    store = pyro.get_param_store()
    if name in store:
        if store[name].unconstrained() is parameter:
            return
        del store[name]
    store[name] = parameter


class _Params(Messenger):
    """Answer a program's param statements with tensors that belong to this program alone.

    1. A parameter of one of the program's modules is that module's own tensor, never one that
       another program left in the store under the same name.
    2. A free ``pyro.param`` lives in the store under its own name; in a copy, under the copy's.
    """

    def __init__(self, program: Program, *, register: bool) -> None:
        super().__init__()
        self.program, self.register = program, register
        self.owned = {id(p) for p in program.parameters()}
        self.seen: set[int] = set()
        self._local: dict[int, str] = {}

    def _pyro_param(self, msg: Any) -> None:
        name, init = msg["args"][0], msg["args"][1] if len(msg["args"]) > 1 else None
        program = self.program
        if isinstance(init, Tensor) and id(init) in self.owned:
            msg["name"] = f"{program.owner}.{name}"
            msg["value"] = init
            self.seen.add(id(init))
        elif msg["value"] is None:
            msg["name"] = final = program.scope + name
            if name in program.pending and final not in pyro.get_param_store():
                init = program.pending.pop(name)
            # A name alone must stay alone: Pyro reads it as "get what is there".
            msg["args"] = (final, *msg["args"][1:]) if init is None else (final, init, *msg["args"][2:])
            self._local[id(msg)] = name
        msg["args"] = (msg["name"], *msg["args"][1:])

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        if id(msg) in self._local:
            self.program.free[self._local.pop(id(msg))] = msg["name"]
        elif isinstance(value, nn.Parameter):
            value.unconstrained = weakref.ref(value)  # type: ignore[attr-defined]
            if self.register:
                _register(msg["name"], value)
        elif hasattr(value, "unconstrained"):  # a PyroParam, kept by its module
            self.seen.add(id(value.unconstrained()))


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
        self.pending: dict[str, Tensor] = {}
        self.free: dict[str, str] = {}

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
        effectful(type="param")(lambda *_, **__: parameter)(name, parameter, name=name)

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the constrained values of the program's free params by their own names."""
        store = pyro.get_param_store()
        values = {name: store[final] for name, final in self.free.items() if final in store}
        return {**self.pending, **{n: v.detach().clone() for n, v in values.items()}}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Give free params their values back, now or when they are first reached."""
        store = pyro.get_param_store()
        for name, value in state.items():
            final = self.free.get(name, self.scope + name)
            if final not in store:
                self.pending[name] = value.clone()
                continue
            with torch.no_grad():
                held = store[final].unconstrained()
                transform = torch.distributions.transform_to(store._constraints[final])
                held.copy_(transform.inv(value.to(held)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = dict(self.__dict__)
        fn, state["pending"] = state.pop("fn", None), {}
        new.__dict__.update(copy.deepcopy(state, memo))
        if fn is not None:
            new.__dict__["fn"] = copy_callable(fn, memo)
        serial = next(_serial)
        # One scope for all programs of one copy: a param that model and guide share stays shared.
        scopes = memo.setdefault(id(_serial), {})
        new.owner, new.free = f"{self.label}{serial}", {}
        new.scope = scopes.setdefault(self.scope, f"copy{serial}.")
        new.pending = self._free_values()
        return new

    def _free_values(self) -> dict[str, Tensor]:
        """Return the values that a copy starts from; before the first run, all in this scope."""
        if self.free or isinstance(self.__dict__.get("fn"), nn.Module):
            return self.get_extra_state()
        store = pyro.get_param_store()
        found = {
            name[len(self.scope) :]: store[name].detach().clone()
            for name in store
            if name.startswith(self.scope) and "$$$" not in name
        }
        return {**found, **self.pending}

    def extra_repr(self) -> str:
        """Name the function that this program runs."""
        fn = self.__dict__.get("fn")
        return "" if fn is None else getattr(fn, "__qualname__", type(fn).__name__)
