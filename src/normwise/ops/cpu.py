"""The C++ kernels. The only place that hands out the memory of tensors.

Each function returns NotImplemented where the kernels do not serve the call (dtypes, mixed devices,
masks of short runs, no extension); the dispatcher then asks the reference.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from normwise.activations import parse
from normwise.errors import InputError, message
from normwise.layout import densify, match

__all__ = [
    "assume_caches",
    "autograd_options",
    "eval_gradients",
    "force",
    "instruction_sets",
    "status",
    "train_gradients",
]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _unavailable(*_: Any) -> None:
    return None


def _load() -> tuple[Any, str]:
    """The extension, or None and why not."""
    if os.environ.get("NORMWISE_BACKEND") == "reference":
        return None, "switched off by NORMWISE_BACKEND=reference"
    try:
        import normwise._native as native

        native.set_exchange(torch.Tensor.__dlpack_c_exchange_api__)
        native.set_torch(
            torch.Tensor,
            torch.nn.Parameter,
            torch.empty_like,
            torch.is_grad_enabled,
            torch._C._len_torch_dispatch_stack,
        )
    except (ImportError, AttributeError, ValueError) as error:
        warnings.warn(
            "normwise: the C++ kernels are not available, the plain PyTorch reference serves "
            f"instead (correct, but slow): {error}. Install where a C++20 compiler (g++ or clang) "
            "is found, or set NORMWISE_BACKEND=reference to silence this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, f"the extension cannot be used: {error}"
    native.set_parallel_for(_torch_symbol("torch_parallel_for"))
    native.set_thread_count(_torch_symbol("torch_get_num_threads"))
    return native, ""


def _torch_symbol(name: str) -> int:
    """Address of a function of torch's stable C interface (since 2.10), or 0.

    Its ``torch_parallel_for`` is torch's own thread pool: ``torch.set_num_threads`` is obeyed and
    no second pool competes. Without it the kernels run on the calling thread.
    """
    directory = os.path.join(os.path.dirname(torch.__file__), "lib")
    for file in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = os.path.join(directory, file)
        if os.path.exists(path):
            try:
                function = getattr(ctypes.CDLL(path), name)
            except (OSError, AttributeError):
                return 0
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


_native, _why_not = _load()

# The whole body of an autograd node for eager calls on plain tensors: (dy, ctx.saved_tensors,
# `autograd_options`) -> the gradients of all the node's arguments, or None if the call is not of
# that kind. In Python the body took 15 us of the 65 us of a backward on (8, 16).
# saved: x, weight, bias, moments (training) or mean, var (eval), and, if there is one of them,
# residual, output, mask. The node's first four arguments are x, weight, bias and residual.
train_gradients: Any = _unavailable if _native is None else _native.train_gradients
eval_gradients: Any = _unavailable if _native is None else _native.eval_gradients


def status() -> tuple[bool, str]:
    """Whether the kernels can serve, and which instruction set or why not."""
    if _native is None:
        return False, _why_not
    threads = "torch's threads" if _native.has_parallel_for() else "one thread"
    others = ", ".join(instruction_sets())
    return True, f"C++ kernels, {_native.instruction_set()} of {others}; {threads}"


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that were compiled in and that this processor has, plainest first."""
    return () if _native is None else tuple(_native.instruction_sets())


@contextlib.contextmanager
def force(instruction_set: str | None) -> Iterator[None]:
    """Run with the named instruction set, or with no kernels at all (None: the reference).

    For tests; process-wide, not thread-safe.
    """
    global _native
    native = _native
    if instruction_set is None:
        _native = None
        if native is not None:
            native.enable(False)
        try:
            yield
        finally:
            _native = native
            if native is not None:
                native.enable(True)
        return
    if native is None or instruction_set not in instruction_sets():
        raise InputError(
            message(
                "an instruction set can be forced if it was built and the processor has it",
                repr(instruction_set),
                f"one of {instruction_sets()}",
            )
        )
    before = native.instruction_set()
    native.select(instruction_set)
    try:
        yield
    finally:
        native.select(before)


@contextlib.contextmanager
def assume_caches(second: int, last: int) -> Iterator[None]:
    """Block the loops for caches of so many bytes: 0 streams and pipelines tensors of any size.

    For tests; process-wide, not thread-safe. Does nothing without the kernels.
    """
    native = _native
    if native is None:
        yield
        return
    before = native.caches()
    native.set_caches(second, last)
    try:
        yield
    finally:
        native.set_caches(*before)


def _vector(v: Tensor | None) -> Tensor | None:
    """A per-channel vector as the kernels read it."""
    if v is None:
        return None
    return (v if v.dtype in _DTYPES else v.to(torch.float64)).contiguous()


def _like(t: Tensor | None, x: Tensor) -> Tensor | None:
    return None if t is None else match(t, x)


@lru_cache(maxsize=1024)
def _template(rows: int, channels: int) -> Tensor:
    return torch.empty((rows, channels), dtype=torch.float64)


def _rows(rows: int, x: Tensor, channel_dim: int) -> Tensor:
    """A float64 (rows, C) tensor; empty_like a kept one takes half the time of torch.empty."""
    return torch.empty_like(_template(rows, x.shape[channel_dim]))


def _negated(x: Tensor, other: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether one is a lazy negation (the imaginary part of a conjugate): memory holds -t."""
    return (
        x.is_neg()
        or (other is not None and other.is_neg())
        or (weight is not None and weight.is_neg())
        or (bias is not None and bias.is_neg())
    )


def _mask(mask: Tensor | None, x: Tensor, channel_dim: int) -> Tensor | None:
    """The mask with the size of x on all axes but the channel's, in x's layout: a byte for each
    place, as the kernels read it."""
    if mask is None or mask.shape[channel_dim] != 1:
        return mask
    if mask.numel() * x.shape[channel_dim] == x.numel() and mask.is_contiguous():
        inner_last = x if channel_dim == x.dim() - 1 else x.movedim(channel_dim, -1)
        if x.is_contiguous() or inner_last.is_contiguous():
            return mask  # (N, 1, L) beside (N, C, L), (N, L, 1) beside (N, L, C): as it should be
    return torch.empty_like(x.narrow(channel_dim, 0, 1), dtype=torch.bool).copy_(mask)


def moments(x: Tensor, mask: Tensor | None, channel_dim: int) -> Any:
    if _native is None or x.is_neg():
        return NotImplemented
    out = _rows(3, x, channel_dim)
    if _native.moments(x, mask, channel_dim, out):
        return out
    x = densify(x)
    if _native.moments(x, _mask(mask, x, channel_dim), channel_dim, out):
        return out
    return NotImplemented


def _forward(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    moments: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
) -> Any:
    """y, by given mean and var, or by the batch's, which are written to `moments`."""
    if _negated(x, residual, weight, bias):
        return NotImplemented
    y = torch.empty_like(x)
    act = parse(activation)
    if _native.forward(
        x, y, moments, mean, var, weight, bias, residual, mask, channel_dim, eps, act.code,
        act.slope,
    ):  # fmt: skip
        return y
    # Something is strided, or in a dtype of its own: bring it into shape and ask again.
    x = densify(x)
    if _native.forward(
        x, y, moments, _vector(mean), _vector(var), _vector(weight), _vector(bias),
        _like(residual, x), _mask(mask, x, channel_dim), channel_dim, eps, act.code, act.slope,
    ):  # fmt: skip
        return y
    return NotImplemented


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
) -> Any:
    if _native is None:
        return NotImplemented
    return _forward(x, mean, var, weight, bias, residual, mask, None, channel_dim, eps, activation)


def train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
) -> Any:
    if _native is None:
        return NotImplemented
    moments = _rows(3, x, channel_dim)
    y = _forward(x, None, None, weight, bias, residual, mask, moments, channel_dim, eps, activation)
    return y if y is NotImplemented else (y, moments)


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    nonfinite_batches: Tensor | None,
    moments: Tensor,
    momentum: float | None,
    nonfinite: str,
) -> Any:
    if _native is None or nonfinite == "raise":
        return NotImplemented
    done = _native.update_running(
        moments, running_mean, running_var, num_batches_tracked, nonfinite_batches,
        -1.0 if momentum is None else momentum, nonfinite == "skip",
    )  # fmt: skip
    return None if done else NotImplemented


def _derivative_from(
    activation: str, residual: Tensor | None, output: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(residual, output), of which the derivative needs at most one: z comes from the output where
    its range tells the derivative, else from x and the residual."""
    act = parse(activation)
    if act.code == 0:
        return None, None
    if output is not None and act.from_output:
        return None, output
    return residual, None


def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    sums: Tensor | None,
    count: float,
    dx: Tensor | None,
    dresidual: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
) -> bool:
    """Fill dx and dresidual; or `sums`, if there is no dx."""
    if dy.is_neg() or _negated(x, residual, weight, bias):
        return False
    act = parse(activation)
    residual, output = _derivative_from(activation, residual, output)
    if _native.backward(
        dy, x, mean, var, weight, bias, residual, output, mask, sums, count, dx, dresidual,
        channel_dim, eps, act.code, act.slope,
    ):  # fmt: skip
        return True
    x = densify(x)
    done: bool = _native.backward(
        match(dy, x), x, _vector(mean), _vector(var), _vector(weight), _vector(bias),
        _like(residual, x), _like(output, x), _mask(mask, x, channel_dim), sums, count, dx,
        dresidual, channel_dim, eps, act.code, act.slope,
    )  # fmt: skip
    return done


def backward_reduce(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
) -> Any:
    if _native is None:
        return NotImplemented
    sums = _rows(2, x, channel_dim)
    done = _backward(
        dy, x, mean, var, weight, bias, residual, output, mask, sums, 0.0, None, None, channel_dim,
        eps, activation,
    )  # fmt: skip
    return sums if done else NotImplemented


def backward_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    sums: Tensor | None,
    count: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
    residual_gradient: bool,
) -> Any:
    if _native is None:
        return NotImplemented
    n = x.numel() / max(x.shape[channel_dim], 1)
    if count is not None:
        each = count.flatten()
        if each.numel() != 1 and not bool((each == each[:1]).all()):
            return NotImplemented  # the kernel knows one count for all channels
        n = max(float(each[0]), 1.0)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if residual_gradient else None
    if sums is not None:
        sums = sums.to(torch.float64).contiguous()
    done = _backward(
        dy, x, mean, var, weight, bias, residual, output, mask, sums, n, dx, dresidual, channel_dim,
        eps, activation,
    )  # fmt: skip
    return (dx, dresidual) if done else NotImplemented


def train_backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
    residual_gradient: bool,
) -> Any:
    return _fused_backward(
        dy, x, moments, None, None, weight, bias, residual, output, mask, channel_dim, eps,
        activation, residual_gradient,
    )  # fmt: skip


def eval_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
    residual_gradient: bool,
) -> Any:
    return _fused_backward(
        dy, x, None, mean, var, weight, bias, residual, output, mask, channel_dim, eps,
        activation, residual_gradient,
    )  # fmt: skip


def _fused_backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
    residual_gradient: bool,
) -> Any:
    """By the batch's moments, or by mean and var as constants."""
    if _native is None:
        return NotImplemented
    if dy.is_neg() or _negated(x, residual, weight, bias):
        return NotImplemented
    act = parse(activation)
    residual, output = _derivative_from(activation, residual, output)
    rest = (residual_gradient, channel_dim, eps, act.code, act.slope)
    result = _native.fused_backward(
        dy, x, moments, mean, var, weight, bias, residual, output, mask, *rest
    )
    if result is None:
        # Parameters keep their dtype here: their gradients are written in it.
        x = densify(x)
        result = _native.fused_backward(
            match(dy, x), x, moments, _vector(mean), _vector(var), weight, bias,
            _like(residual, x), _like(output, x), _mask(mask, x, channel_dim), *rest,
        )  # fmt: skip
    return NotImplemented if result is None else result


def autograd_options(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
    arguments: int,
    native: bool,
) -> tuple[int, float, str, int, float, int, bool, bool]:
    """What an autograd node keeps beside tensors, and `train_gradients`, `eval_gradients` take.

    (channel_dim, eps, activation, its code and slope, how many arguments the node's forward has,
    whether the residual wants its gradient, whether the kernels may serve).
    """
    act = parse(activation)
    native = (
        native and not torch.compiler.is_compiling() and not _negated(x, residual, weight, bias)
    )
    residual_gradient = residual is not None and residual.requires_grad
    return channel_dim, eps, activation, act.code, act.slope, arguments, residual_gradient, native
