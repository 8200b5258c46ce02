"""Which backend serves a call: the CPU kernels where they can, the reference everywhere else.

The functions here return None for a gradient that was not asked for (through the dispatcher an
empty tensor).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normwise.ops import cpu, reference, sets
from normwise.ops.schema import LIBRARY, NAMESPACE

__all__ = ["OPERATORS"]

OPERATORS = (
    "moments",
    "normalize",
    "train_forward",
    "update_running",
    "backward_reduce",
    "backward_input",
    "train_backward",
    "eval_backward",
    "sets_forward",
    "sets_backward",
)


def _cpu_or_reference(native: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        result = native(*args)
        return plain(*args) if result is NotImplemented else result

    return call


def _registered(backend: Callable[..., Any]) -> Callable[..., Any]:
    """A schema knows no optional results: a gradient that is not there becomes an empty tensor."""

    def call(*args: Any) -> Any:
        result = backend(*args)
        if isinstance(result, tuple):
            return tuple(args[0].new_empty((0,)) if r is None else r for r in result)
        return result

    return call


_PLAIN = (Tensor, torch.nn.Parameter)


def _operator(name: str, kernels: Any = cpu) -> Callable[..., Any]:
    native, plain = getattr(kernels, name), getattr(reference, name)
    LIBRARY.impl(name, _registered(plain), "CompositeExplicitAutograd")
    LIBRARY.impl(name, _registered(_cpu_or_reference(native, plain)), "CPU")
    through_dispatcher = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(first: Tensor, *args: Any) -> Any:
        # An eager call on a plain CPU tensor needs no dispatcher (2 to 3 us a call, as much as
        # the kernel itself takes on a small batch); compilers, modes and subclasses do.
        if (
            not torch.compiler.is_compiling()
            and type(first) in _PLAIN
            and first.is_cpu
            and not torch._C._len_torch_dispatch_stack()
        ):
            result = native(first, *args)
            return plain(first, *args) if result is NotImplemented else result
        return through_dispatcher(first, *args)

    call.__name__ = call.__qualname__ = name
    return call


moments = _operator("moments")
normalize = _operator("normalize")
train_forward = _operator("train_forward")
update_running = _operator("update_running")
backward_reduce = _operator("backward_reduce")
backward_input = _operator("backward_input")
train_backward = _operator("train_backward")
eval_backward = _operator("eval_backward")
sets_forward = _operator("sets_forward", sets)
sets_backward = _operator("sets_backward", sets)
