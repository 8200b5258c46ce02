"""A pickle machine that calls nothing.

A pickle is a program: it names functions, anywhere in Python, and calls them. This machine runs the
program's steps on plain data only. A global is a name, never imported; a call of one of the few
names in :mod:`~normwise.interop.checkpoints.globals` makes what stands for its result; any other
call ends the reading with an error that has the name.

Why not ``torch.load(weights_only=True)``: it loads all tensors, and what it takes to load a hostile
file has no bound. Nor ``pickle.Unpickler`` with other lookups: its memo grows to whatever index the
file names (2**32 entries of 8 bytes for one step of 5), and as a key of a dictionary a tuple nested
a million deep overflows the stack of the process. Here steps and containers are counted and keys
are plain. The steps are decoded by the standard library's :mod:`pickletools`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, ClassVar

from normwise.errors import CheckpointError
from normwise.interop.checkpoints.file import Region, Stream
from normwise.interop.checkpoints.globals import OPAQUE, Global, Instance, Storage, call, new
from normwise.interop.checkpoints.limits import CONTAINERS, DESCRIPTION, STEPS, shown

__all__ = ["Machine", "stream_of"]

KEYS = (str, int, float, bool, bytes, type(None))


def stream_of(region: Region) -> Stream:
    """The start of ``region``, as much as a pickle of tensors may have."""
    return Stream(region.read(0, min(region.size, DESCRIPTION)))


def _constant(value: Any) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine._stack.append(value)


def _tuple(size: int) -> Callable[[Machine, Any], None]:
    def step(machine: Machine, _: None) -> None:
        stack = machine._stack
        start = len(stack) - size
        if start < 0:
            raise IndexError("an empty stack")
        items = tuple(stack[start:])
        del stack[start:]
        machine._put(items)

    return step


class Machine:
    """Runs one pickle of ``stream``, which lies in ``region``."""

    def __init__(self, stream: Stream, region: Region) -> None:
        self._stream, self._region = stream, region
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._containers = 0

    def run(self) -> Any:
        """What the pickle makes; the stream stands behind it."""
        code = self._stream.getbuffer()
        left = len(code) - self._stream.tell()
        code.release()
        steps = 0
        try:
            for opcode, argument, _ in pickletools.genops(self._stream):
                steps += 1
                if steps > STEPS or self._containers > CONTAINERS:
                    self._region.refuse("a pickle of more steps than tensors take")
                name = opcode.name
                if name in self._CONSTANTS:
                    self._stack.append(argument)
                elif name == "STOP":
                    return self._stack.pop()
                else:
                    self._STEPS[name](self, argument)
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # what a damaged program makes a step trip over
            if left >= DESCRIPTION and self._stream.tell() >= DESCRIPTION - 9:
                self._region.refuse("a pickle that is longer than one of tensors is")
            self._region.refuse(f"a damaged pickle ({shown(str(error), 120)})")
        self._region.refuse("a pickle without an end")

    # Each step takes the argument that stands in the pickle.

    def _put(self, value: Any) -> None:
        self._containers += 1
        self._stack.append(value)

    def _items(self) -> list[Any]:
        """What was pushed since the last mark."""
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _mark(self, _: None) -> None:
        self._marks.append(self._stack)
        self._stack = []
        self._containers += 1

    def _pop(self, _: None) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._stack = self._marks.pop()

    def _pop_mark(self, _: None) -> None:
        self._items()

    def _dup(self, _: None) -> None:
        self._stack.append(self._stack[-1])

    def _nothing(self, _: object) -> None:
        pass

    def _memoize(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else int(index)] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[int(index)])

    def _global(self, names: str) -> None:
        module, _, name = names.partition(" ")
        self._put(Global(module, name))

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global whose name is no text")
        self._put(Global(module, name))

    def _marked_tuple(self, _: None) -> None:
        self._put(tuple(self._items()))

    def _list(self, _: None) -> None:
        self._put(self._items())

    def _dict(self, _: None) -> None:
        items = self._items()
        self._put({})
        self._set(self._stack[-1], items)

    def _empty_list(self, _: None) -> None:
        self._put([])

    def _empty_dict(self, _: None) -> None:
        self._put({})

    def _set_of_anything(self, _: None) -> None:
        self._put(OPAQUE)

    def _frozenset(self, _: None) -> None:
        self._items()
        self._put(OPAQUE)

    def _append(self, _: None) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._items())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif target is not OPAQUE:
            raise TypeError("items for what is no list")

    def _set_item(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set(self._stack[-1], [key, value])

    def _set_items(self, _: None) -> None:
        items = self._items()
        self._set(self._stack[-1], items)

    def _set(self, target: Any, items: list[Any]) -> None:
        if target is OPAQUE:
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("keys for what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, KEYS):  # the name of a tensor is one; hash() recurses into tuples
                target[key] = value

    def _reduce(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._put(call(function, arguments, self._region))

    def _new(self, _: None) -> None:
        self._stack.pop()
        self._put(new(self._stack.pop(), self._region))

    def _new_ex(self, _: None) -> None:
        self._stack.pop()
        self._new(None)

    def _instance(self, names: str) -> None:
        self._items()
        module, _, name = names.partition(" ")
        self._put(new(Global(module, name), self._region))

    def _object(self, _: None) -> None:
        self._put(new(self._items()[0], self._region))

    def _build(self, _: None) -> None:
        """Attributes. Those of an OrderedDict (_metadata of a state dict) name no tensor."""
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Instance) and isinstance(state, dict):
            target.update(state)

    def _persistent(self, _: None) -> None:
        """A storage; in the format before 1.6 also a class, with the text of its source."""
        pid = self._stack.pop()
        source = isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module"
        self._put(pid[1] if source else Storage.of(pid, self._region))

    def _refused(self, _: object) -> None:
        raise ValueError("a step that torch.save does not write")

    _CONSTANTS: ClassVar = frozenset((
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
        "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    ))  # fmt: skip
    _STEPS: ClassVar[dict[str, Callable[[Machine, Any], None]]] = {
        "PROTO": _nothing, "FRAME": _nothing, "MARK": _mark, "POP": _pop, "POP_MARK": _pop_mark,
        "DUP": _dup, "NONE": _constant(None), "NEWTRUE": _constant(True),
        "NEWFALSE": _constant(False), "PUT": _memoize, "BINPUT": _memoize,
        "LONG_BINPUT": _memoize, "MEMOIZE": _memoize, "GET": _get, "BINGET": _get,
        "LONG_BINGET": _get, "GLOBAL": _global, "STACK_GLOBAL": _stack_global,
        "EMPTY_TUPLE": _tuple(0), "TUPLE1": _tuple(1), "TUPLE2": _tuple(2), "TUPLE3": _tuple(3),
        "TUPLE": _marked_tuple, "EMPTY_LIST": _empty_list, "LIST": _list, "APPEND": _append,
        "APPENDS": _appends, "EMPTY_DICT": _empty_dict, "DICT": _dict, "SETITEM": _set_item,
        "SETITEMS": _set_items, "EMPTY_SET": _set_of_anything, "ADDITEMS": _appends,
        "FROZENSET": _frozenset, "REDUCE": _reduce, "NEWOBJ": _new, "NEWOBJ_EX": _new_ex,
        "INST": _instance, "OBJ": _object, "BUILD": _build, "BINPERSID": _persistent,
        "PERSID": _refused, "EXT1": _refused, "EXT2": _refused, "EXT4": _refused,
        "NEXT_BUFFER": _refused, "READONLY_BUFFER": _refused,
    }  # fmt: skip
