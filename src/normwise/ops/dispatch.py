"""Which backend serves a call: the CPU kernels where they can, the reference everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normwise.ops import cpu, reference
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
)


def _cpu_or_reference(name: str) -> Callable[..., Any]:
    native, plain = getattr(cpu, name), getattr(reference, name)

    def call(*args: Any) -> Any:
        result = native(*args)
        return plain(*args) if result is NotImplemented else result

    return call


def _register() -> dict[str, Callable[..., Any]]:
    on_cpu = {}
    for name in OPERATORS:
        LIBRARY.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        on_cpu[name] = _cpu_or_reference(name)
        LIBRARY.impl(name, on_cpu[name], "CPU")
    return on_cpu


_ON_CPU = _register()
_PLAIN = (Tensor, torch.nn.Parameter)


def _operator(name: str) -> Callable[..., Any]:
    through_dispatcher = getattr(getattr(torch.ops, NAMESPACE), name).default
    on_cpu = _ON_CPU[name]

    def call(first: Tensor, *args: Any) -> Any:
        # An eager call on a plain CPU tensor needs no dispatcher (2 to 3 us a call, as much as
        # the kernel itself takes on a small batch); compilers, modes and subclasses do.
        if (
            type(first) in _PLAIN
            and first.is_cpu
            and not torch._C._len_torch_dispatch_stack()
            and not torch.compiler.is_compiling()
        ):
            return on_cpu(first, *args)
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
