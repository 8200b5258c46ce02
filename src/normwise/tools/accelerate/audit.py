"""What a forward may do while it is traced, so that its trace is all that it does.

A trace keeps what happens to tensors and forgets the rest: the state of a random generator that was
drawn from, a context manager that was entered, a counter that was moved. So while a forward runs on
proxies a profile function watches every call that its own code makes (and the code of the user's
helpers), and every global that this code names. What is not known to be free of state is refused.
"""

from __future__ import annotations

import enum
import functools
import os
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["Audit", "Untraceable", "is_plain"]


class Untraceable(Exception):
    """The forward cannot be told from a trace; ``reason`` is one of the report's."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(__file__) + os.sep
_PROXIES = os.path.join(_TORCH, "fx") + os.sep
_MODULES = os.path.join(_TORCH, "nn", "modules") + os.sep
_CALLERS = (_MODULES, os.path.join(_OURS, "classes.py"))

# Of nn.Module and its containers: what calls, reads and iterates.
_PLUMBING = frozenset(
    {
        "_wrapped_call_impl", "_call_impl", "__getattr__", "__setattr__", "__iter__", "__len__",
        "__getitem__", "_get_item_by_idx", "_get_abs_string_index", "items", "values", "keys",
        "__contains__", "forward",
    }
)  # fmt: skip
# False wherever a trace is run: the original forward serves under scripting, tracing, compiling.
_ASKING = frozenset({"is_scripting", "is_tracing", "is_compiling", "is_dynamo_compiling"})
_BUILTINS = frozenset(
    {
        len, isinstance, issubclass, hasattr, getattr, min, max, sum, abs, iter, next, callable,
        divmod, round, any, all, sorted, pow, repr, hash, format,
    }
)  # fmt: skip
_VALUES = (list, dict, tuple, str, set, frozenset, OrderedDict, int, float, bool, range, bytes)
_PURE_MODULES = frozenset({"math", "_operator", "operator", "itertools", "_functools"})
_NAMESPACES = frozenset(
    {"torch", "math", "operator", "functools", "itertools", "typing", "collections", "normwise",
     "types", "typing_extensions"}
)  # fmt: skip
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)


@functools.cache
def _overridable() -> tuple[frozenset[Any], frozenset[types.CodeType]]:
    """torch's functions that hand a proxy to the tracer, and the code of those in Python."""
    functions = {f for f in torch.overrides.get_testing_overrides() if callable(f)}
    codes = (getattr(f, "__code__", None) for f in functions)
    # Those that torch forgot to list, and that hand a proxy on all the same.
    more = (F.hardswish.__code__,)
    return frozenset(functions), frozenset((*(c for c in codes if c is not None), *more))


def is_plain(value: Any) -> bool:
    """Whether a value is one of those that never change."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(is_plain, value))
    return value is None or isinstance(
        value,
        (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device,
         torch.memory_format, torch.layout, slice, type(Ellipsis), type(NotImplemented)),
    )  # fmt: skip


class Audit:
    """Watches one trace. ``names``: what the user's code named; ``globals``: values it read."""

    def __init__(self, entry: types.CodeType) -> None:
        self.entry = entry
        self.refusal: Untraceable | None = None
        self.names: set[str] = set()
        self.globals: list[tuple[dict[str, Any], str, Any]] = []
        self.calling: Any = None  # the function in C that one of them calls
        self.frames: set[types.FrameType] = set()  # the user's that run
        self.seen: set[types.CodeType] = set()
        self.nested: set[types.CodeType] = set()

    def refuse(self, reason: str, detail: str) -> None:
        if self.refusal is None:
            self.refusal = Untraceable(reason, detail)

    def __call__(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code, caller = frame.f_code, frame.f_back
            assert caller is not None
            file, from_user = code.co_filename, caller in self.frames
            if code is self.entry:
                self.frames.add(frame)
            elif not file.startswith((_TORCH, _OURS)):
                # What torch calls for its own ends, out of the standard library, is not looked at.
                if from_user or caller.f_code.co_filename.startswith(_CALLERS):
                    self.frames.add(frame)
                    if code not in self.seen:
                        self.look_at(code, frame)
            elif from_user:
                self.enter(code)
        elif event == "return":
            self.frames.discard(frame)
        elif frame in self.frames and frame.f_code is not self.entry:
            self.calling = argument if event == "c_call" else None
            if event == "c_call":
                self.call(argument)

    def enter(self, code: types.CodeType) -> None:
        file, name = code.co_filename, code.co_name
        if file.startswith((_PROXIES, _OURS)) or code in _overridable()[1]:
            return
        if name in _ASKING or (file.startswith(_MODULES) and name in _PLUMBING):
            return
        self.refuse("state", f"it calls {name} of {os.path.basename(file)}")

    def call(self, function: Any) -> None:
        owner = getattr(function, "__self__", None)
        try:
            if function in _BUILTINS or function in _overridable()[0]:
                return
        except TypeError:  # unhashable
            pass
        if function == getattr(torch._C._VariableFunctions, function.__name__, None):
            return
        if isinstance(owner, (*_VALUES, fx.Proxy)) or owner in _VALUES:
            return
        if getattr(function, "__objclass__", None) in _VALUES:
            return
        if getattr(function, "__module__", None) in _PURE_MODULES:
            return
        if owner is object or isinstance(owner, (super, nn.Module)):
            return
        self.refuse("state", f"it calls {getattr(function, '__qualname__', function)}")

    def look_at(self, code: types.CodeType, frame: types.FrameType) -> None:
        """The names of code that runs for the first time, and the globals among them."""
        self.seen.add(code)
        self.names.update(code.co_names)
        inner = code in self.nested
        self.nested.update(c for c in code.co_consts if isinstance(c, types.CodeType))
        if "backends" in code.co_names:
            self.refuse("state", "it reads torch.backends")
        for name in code.co_names:
            if name in frame.f_globals:
                self.read_global(frame.f_globals, name)
        if code.co_freevars and not inner:
            for name in code.co_freevars:
                value = frame.f_locals.get(name)
                if name != "__class__" and not self.is_constant(value):
                    self.refuse("state", f"it reads {name} of the scope around it")

    def read_global(self, space: dict[str, Any], name: str) -> None:
        value = space[name]
        if is_plain(value):
            self.globals.append((space, name, value))
        elif not self.is_constant(value):
            self.refuse("state", f"it reads the global {name}")

    def is_constant(self, value: Any) -> bool:
        if isinstance(value, types.ModuleType):
            return value.__name__.partition(".")[0] in _NAMESPACES
        home = type(value).__module__
        return (
            is_plain(value)
            or isinstance(value, (*_FUNCTIONS, fx.Proxy, functools.partial))
            or home == "typing"
            or (isinstance(value, types.GenericAlias))
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Raises :class:`Untraceable` at the end for what was seen in the block."""
        if sys.getprofile() is not None:
            raise Untraceable("profiled", "a profiler runs")
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
        if self.refusal is not None:
            raise self.refusal
