"""What the code of a module's class names: whether it may reach past a child to the child's own
children.

A run shows one way through code that decides by values. On another way it may call, instead of a
block, a layer inside the block (``self.block[0](x)``), and that layer has changed if the block's
norm was folded. The instructions of the class's functions tell.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator

from torch import nn

__all__ = ["may_reach_into"]

_SUBSCRIPTS = frozenset({"BINARY_SUBSCR", "BINARY_SLICE", "GET_ITER"})


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _functions(module: nn.Module) -> Iterator[types.CodeType]:
    """The methods of its class and what it keeps as attributes: functions of Python alone."""
    found = [f for cls in type(module).__mro__ if cls not in nn.Module.__mro__
             for f in vars(cls).values()]  # fmt: skip
    for f in (*found, *vars(module).values()):
        code = getattr(f, "__code__", None)
        if isinstance(code, types.CodeType) and f is not vars(type(module)).get("__init__"):
            yield from _codes(code)


@functools.lru_cache(maxsize=1024)
def _deep_names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Attributes that are read from anything but the first argument; and those that are indexed or
    iterated."""
    deep, indexed = set(), set()
    first = code.co_varnames[0] if code.co_argcount else None
    before: list[dis.Instruction] = []
    for i in dis.get_instructions(code):
        if i.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            last = before[-1] if before else None
            name = last.argval if last is not None and "LOAD_FAST" in last.opname else None
            own = name[-1] if isinstance(name, tuple) else name
            if own is None or own != first:
                deep.add(str(i.argval))
        if i.opname in _SUBSCRIPTS or (i.opname == "BINARY_OP" and i.argrepr == "[]"):
            near = [b for b in before[-4:] if b.opname in ("LOAD_ATTR", "LOAD_METHOD")]
            indexed |= {str(b.argval) for b in near}
        if i.opname != "CACHE":
            before.append(i)
    return frozenset(deep), frozenset(indexed)


def may_reach_into(caller: nn.Module, child: nn.Module) -> bool:
    """Whether the code of ``caller`` names what stands inside ``child``."""
    deep: set[str] = set()
    indexed: set[str] = set()
    for code in _functions(caller):
        names = _deep_names(code)
        deep |= names[0]
        indexed |= names[1]
    # The names under which the child is held, the last of them: `blocks` for `self.blocks[0]`.
    held = {
        name for module in caller.modules() for name, m in module._modules.items() if m is child
    }
    inner = set(child._modules)
    if any(name in deep for name in inner if not name.isdigit()):
        return True
    return any(name.isdigit() for name in inner) and not held.isdisjoint(indexed)
