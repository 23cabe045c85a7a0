"""What a callable refers to, and how to copy it together with that."""

from __future__ import annotations

import copy
import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["copy_callable", "find_modules"]

_LIBRARIES = {"torch", "pyro", "numpy", "math", "builtins"}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of a function and of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _global_names(fn: types.FunctionType) -> set[str]:
    """Return the global names that a function reads, and no names of attributes."""
    return {
        step.argval
        for code in _codes(fn.__code__)
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in fn.__globals__
    }


def _references(fn: Any) -> Iterator[Any]:
    """Yield the objects that a callable refers to: its owner, closure, defaults and globals."""
    if isinstance(fn, functools.partial):
        yield from (fn.func, *fn.args, *fn.keywords.values())
    elif isinstance(fn, types.MethodType):
        yield from (fn.__self__, fn.__func__)
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
        yield from (fn.__globals__[name] for name in sorted(_global_names(fn)))
    elif isinstance(fn, list | tuple):
        yield from fn
    elif isinstance(fn, dict):
        yield from fn.values()
    elif isinstance(fn, nn.Module):
        for kind in dict.fromkeys(type(child) for child in fn.modules()):
            for base in kind.__mro__:
                if base.__module__.split(".")[0] not in _LIBRARIES:
                    yield from (v for v in vars(base).values() if isinstance(v, types.FunctionType))
    elif type(fn).__module__.split(".")[0] not in _LIBRARIES and hasattr(fn, "__dict__"):
        if not isinstance(fn, type | types.ModuleType):
            yield from vars(fn).values()
            yield type(fn).__dict__.get("__call__")


def _reachable(fn: Any) -> Iterator[Any]:
    """Yield a callable and what it refers to, nearest first along each path, each object once."""
    seen: set[int] = set()
    waiting = [fn]
    while waiting:
        item = waiting.pop()
        if id(item) not in seen:
            seen.add(id(item))
            yield item
            waiting.extend(reversed(list(_references(item))))


def find_modules(fn: Any) -> list[nn.Module]:
    """Return every ``nn.Module`` that a callable refers to, outermost first."""
    found = [item for item in _reachable(fn) if isinstance(item, nn.Module)]
    inner = {id(child) for module in found for child in module.modules() if child is not module}
    return [module for module in found if id(module) not in inner]


def copy_callable(fn: Any, memo: dict[int, Any]) -> Any:
    """Deep-copy a callable together with the modules that it refers to.

    Python's ``deepcopy`` returns functions as they are, so that a copy would train the original's
    networks: functions that reach a module are rebuilt around the copied module.
    """
    if id(fn) in memo:
        return memo[id(fn)]
    if not isinstance(fn, nn.Module) and not find_modules(fn):
        return fn if isinstance(fn, types.FunctionType) else copy.deepcopy(fn, memo)
    if isinstance(fn, types.FunctionType):
        return _copy_function(fn, memo)
    if isinstance(fn, types.MethodType):
        return types.MethodType(copy_callable(fn.__func__, memo), copy_callable(fn.__self__, memo))
    if isinstance(fn, functools.partial) and type(fn) is not functools.partial:
        # What a Pyro handler makes of a function: it keeps the function out of partial's own slots.
        return type(fn)(copy_callable(fn.func, memo))
    if isinstance(fn, functools.partial):
        args = [copy_callable(item, memo) for item in fn.args]
        named = {name: copy_callable(item, memo) for name, item in fn.keywords.items()}
        return functools.partial(copy_callable(fn.func, memo), *args, **named)
    if type(fn) in (list, tuple):
        return type(fn)(copy_callable(item, memo) for item in fn)
    if type(fn) is dict:
        return {key: copy_callable(item, memo) for key, item in fn.items()}
    return copy.deepcopy(fn, memo)


def _copy_function(fn: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """Rebuild a function around copies of the modules in its closure, defaults and globals."""
    names = _global_names(fn)
    replaced = {n: fn.__globals__[n] for n in names if find_modules(fn.__globals__[n])}
    scope = fn.__globals__ if not replaced else dict(fn.__globals__)
    cells = tuple(types.CellType() for _ in fn.__closure__ or ())
    new = types.FunctionType(fn.__code__, scope, fn.__name__, None, cells or None)
    new.__dict__.update(fn.__dict__)
    new.__qualname__, new.__doc__ = fn.__qualname__, fn.__doc__
    memo[id(fn)] = new  # before its references: functions may refer to each other
    new.__defaults__ = _copy_some(fn.__defaults__, memo)
    new.__kwdefaults__ = _copy_some(fn.__kwdefaults__, memo)
    for cell, old in zip(cells, fn.__closure__ or (), strict=True):
        try:
            cell.cell_contents = _copy_some(old.cell_contents, memo)
        except ValueError:
            continue
    if replaced:
        scope.update({n: copy_callable(value, memo) for n, value in replaced.items()})
    return new


def _copy_some(value: Any, memo: dict[int, Any]) -> Any:
    return copy_callable(value, memo) if find_modules(value) else value
