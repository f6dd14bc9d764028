"""A hash of a Python function by what it computes: its bytecode, and the values that it refers to.

    code constants, defaults, closures, arguments of ``partial``, globals that it names      by value
    functions, methods and classes among them                                             by their own hash
    tensors, arrays, models                                                               by content
    what Python, torch and other installed packages define                                by name

Comments, names of local variables, and the place in a file do not count. Bytecode is that of one version of Python,
which is therefore part of the result.
"""

import dis
import enum
import functools
import hashlib
import inspect
import json
import logging
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from funcattrib.models.identity import model_identity, settings_of
from funcattrib.weights.content_hash import hash_tensors

log = logging.getLogger(__name__)

_MOST = 100_000  # values that are looked at before it is given up
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(Ellipsis),
    range,
    torch.dtype,
    torch.device,
    torch.Size,
)
_BUILTIN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType)
_OF_CLASS = ("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__", "__firstlineno__")
_LIBRARIES = tuple(
    os.path.join(os.path.realpath(sysconfig.get_paths()[key]), "") for key in ("stdlib", "purelib", "platlib")
)
_OURS = "funcattrib"


class _UnknownError(Exception):
    """Something whose value cannot be read."""


def code_hash(function: Callable[..., Any] | Sequence[Callable[..., Any] | None], what: str) -> dict[str, str] | None:
    """Return the manifest's entry for a function, or for several together: the version of Python and a hash.

    None where it cannot be computed, which is logged.

    Args:
        what: the function, for the log.

    Example:
        >>> def scaled(by):
        ...     return lambda x: by * x
        >>> one, same, other = (code_hash(scaled(by), "scaled") for by in (2, 2, 3))
        >>> one == same, one == other
        (True, False)
    """
    try:
        found = _Walk(function).hash(function)
    except (_UnknownError, RecursionError) as error:
        _say_unknown(what, str(error) or type(error).__name__)
        return None
    return {"python": "{}.{}".format(*sys.version_info), "sha256": found.hex()}


@functools.cache  # once
def _say_unknown(what: str, why: str) -> None:
    log.warning("the code of %s cannot be compared with that of other runs: %s", what, why)


def is_own(value: Any) -> bool:
    """Return whether a function, or one that it holds in ``partial`` or a closure, is from outside of this library.

    Example:
        >>> is_own(is_own), is_own(functools.partial(torch.nn.functional.relu, torch.ones(1)))
        (False, False)
    """
    return _is_own(value, set())


def _is_own(value: Any, seen: set[int]) -> bool:
    if id(value) in seen:
        return False
    seen.add(id(value))
    inside: list[Any] = []
    if isinstance(value, functools.partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        inside = [value.__func__, value.__self__]
    elif isinstance(value, types.FunctionType):
        if not _is_library(value.__module__):
            return True
        inside = [*_closure(value).values(), *(value.__defaults__ or ())]
    elif isinstance(value, (list, tuple)):
        inside = list(value)
    elif isinstance(value, dict):
        inside = list(value.values())
    elif callable(value) and not isinstance(value, (type, nn.Module, *_BUILTIN)):
        inside = [getattr(value, "__wrapped__", None)]
        if not _is_library(type(value).__module__):
            return True
    return any(_is_own(each, seen) for each in inside)


@functools.cache
def _is_library(module: str | None) -> bool:
    """Return whether a module belongs to this library, to Python, or to another installed package."""
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names or top in (_OURS, "builtins"):
        return top != "__main__"
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is not None and os.path.realpath(file).startswith(_LIBRARIES)


class _Walk:
    """A walk over all that a function refers to; a value inside itself is the depth at which it began."""

    def __init__(self, root: Any) -> None:
        self._begun: dict[int, int] = {}
        self._done: dict[int, bytes] = {}
        self._kept: list[Any] = []  # as an id is that of a living object
        roots = root if isinstance(root, Iterable) else [root]
        self._modules = {getattr(each, "__module__", None) for each in roots}

    def hash(self, value: Any) -> bytes:
        """Compute the hash of a value of any kind."""
        if isinstance(value, _PLAIN):
            return _sum(type(value).__name__, repr(value))
        if id(value) in self._done:
            return self._done[id(value)]
        if id(value) in self._begun:
            return _sum("inside", str(self._begun[id(value)]))
        if len(self._kept) >= _MOST:
            raise _UnknownError(f"it refers to more than {_MOST:,} values")
        self._begun[id(value)] = len(self._begun)
        self._kept.append(value)
        found = self._of(value)
        del self._begun[id(value)]
        self._done[id(value)] = found
        return found

    def _of(self, value: Any) -> bytes:
        if isinstance(value, Tensor):
            return _sum("tensor", hash_tensors({"": value}).content)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            return _sum("array", value.dtype.str, str(value.shape), hashlib.sha256(value.tobytes()).digest())
        if isinstance(value, nn.Module):
            content = model_identity(value)["content"] if any(True for _ in value.parameters()) else None
            kinds = dict.fromkeys(type(each) for each in value.modules())
            return _sum("module", json.dumps([content, settings_of(value)], default=str), *map(self.hash, kinds))
        if isinstance(value, (list, tuple)):
            return _sum("sequence", type(value).__name__, *map(self.hash, value))
        if isinstance(value, Mapping) and isinstance(value, dict | types.MappingProxyType):
            return _sum("dict", *(self.hash(key) + self.hash(item) for key, item in value.items()))
        if isinstance(value, (set, frozenset)):
            return _sum("set", *sorted(self.hash(item) for item in value))
        if isinstance(value, enum.Enum):
            return _sum("enum", type(value).__qualname__, value.name)
        if isinstance(value, functools.partial):
            return _sum("partial", *map(self.hash, (value.func, value.args, value.keywords)))
        if isinstance(value, types.MethodType):
            return _sum("method", self.hash(value.__func__), self.hash(value.__self__))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, (staticmethod, classmethod)):
            return _sum(type(value).__name__, self.hash(value.__func__))
        if isinstance(value, property):
            return _sum("property", *map(self.hash, (value.fget, value.fset, value.fdel)))
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            return _sum("module", value.__name__)
        if isinstance(value, types.CodeType):
            return self._code(value, None)
        if isinstance(value, logging.Logger):
            return _sum("logger", value.name)
        if isinstance(value, (*_BUILTIN, np.ufunc)) or type(value).__module__ == "typing":
            return _sum("name", getattr(value, "__module__", None) or "", getattr(value, "__qualname__", repr(value)))
        wrapped = getattr(value, "__wrapped__", None)
        if callable(value) and wrapped is not None:  # of functools.cache, jax.jit and their like
            return _sum("wrapped", type(value).__qualname__, self.hash(wrapped))
        return self._object(value)

    def _function(self, function: types.FunctionType) -> bytes:
        if not self._followed(function.__module__):
            held = [_closure(function), function.__defaults__ or ()]
            return _sum("name", function.__module__ or "", function.__qualname__, *map(self.hash, held))
        parts = [self._code(function.__code__, function.__doc__), self.hash(function.__defaults__)]
        parts += [self.hash(function.__kwdefaults__), self.hash(_closure(function))]
        names = _globals_of(function.__code__)
        for name in sorted(names):
            value = function.__globals__.get(name, _BUILTIN)  # a builtin, or not there (yet)
            if value is _BUILTIN:
                continue
            parts += [name.encode(), self.hash(value)]
            if isinstance(value, types.ModuleType) and self._followed(value.__name__):
                attributes = sorted(_names_in(function.__code__) & vars(value).keys())
                parts += [self.hash(vars(value)[each]) for each in attributes]
        return _sum("function", *parts)

    def _class(self, kind: type) -> bytes:
        if not self._followed(kind.__module__):
            return _sum("name", kind.__module__, kind.__qualname__)
        members = {key: value for key, value in sorted(vars(kind).items()) if key not in _OF_CLASS}
        members = {
            key: value for key, value in members.items() if not inspect.isdatadescriptor(value) or _readable(value)
        }
        members = {
            key: value for key, value in members.items() if not key.startswith(("_abc_", "__static_attributes__"))
        }
        return _sum(
            "class", *map(self.hash, kind.__bases__), *(key.encode() + self.hash(members[key]) for key in members)
        )

    def _code(self, code: types.CodeType, doc: str | None) -> bytes:
        constants = [
            None if number == 0 and doc is not None and constant == doc else constant
            for number, constant in enumerate(code.co_consts)
        ]
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        names = (code.co_names, arguments, code.co_freevars, code.co_cellvars)
        return _sum("code", code.co_code, repr(counts), repr(names), code.co_exceptiontable, *map(self.hash, constants))

    def _object(self, value: Any) -> bytes:
        """Hash an object by how it would be pickled: its class, and its state."""
        if isinstance(value, torch.Generator):
            return _sum("generator", hash_tensors({"": value.get_state()}).content)
        if hasattr(value, "__array__") and hasattr(value, "dtype"):  # jax
            return self._of(np.asarray(value))
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:  # whatever an object that cannot be pickled raises
            raise _UnknownError(f"it refers to {type(value).__qualname__}, which cannot be read ({error})") from error
        if isinstance(reduced, str):
            return _sum("name", type(value).__module__, reduced)
        make, arguments, state, items, pairs = (*reduced, *[None] * 5)[:5]
        parts = [self.hash(type(value)), self.hash(make), self.hash(arguments), self.hash(state)]
        parts += [self.hash(list(each)) for each in (items, pairs) if each is not None]
        return _sum("object", *parts)

    def _followed(self, module: str | None) -> bool:
        """Return whether code of a module is read: it is not in an installed package, or it is the function's own."""
        return not _is_library(module) or (module in self._modules and not str(module).startswith(f"{_OURS}."))


def _readable(value: Any) -> bool:
    return isinstance(value, property)


def _closure(function: types.FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not there yet
            continue
    return found


def _codes_in(code: types.CodeType) -> list[types.CodeType]:
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return [code, *(found for each in inner for found in _codes_in(each))]


def _globals_of(code: types.CodeType) -> set[str]:
    wanted = ("LOAD_GLOBAL", "LOAD_NAME")
    return {
        str(step.argval) for each in _codes_in(code) for step in dis.get_instructions(each) if step.opname in wanted
    }


def _names_in(code: types.CodeType) -> set[str]:
    return {name for each in _codes_in(code) for name in each.co_names}


def _sum(kind: str, *parts: str | bytes) -> bytes:
    whole = hashlib.sha256(kind.encode())
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.digest()
