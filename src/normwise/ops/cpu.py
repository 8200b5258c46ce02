"""The C++ kernels: raw pointers in, nothing out. The only place that touches ``data_ptr``.

Each function returns NotImplemented where the kernels do not serve the call (masks, dtypes,
mixed devices, no extension); the dispatcher then asks the reference.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from normwise.activations import parse
from normwise.errors import InputError, message
from normwise.layout import densify, geometry, match

__all__ = ["force", "instruction_sets", "status"]

# The codes of csrc/kernels.h.
_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _load() -> tuple[Any, str]:
    """The extension, or None and why not."""
    if os.environ.get("NORMWISE_BACKEND") == "reference":
        return None, "switched off by NORMWISE_BACKEND=reference"
    try:
        from normwise import _native
    except ImportError as error:
        warnings.warn(
            "normwise: the C++ kernels are not available, the plain PyTorch reference serves "
            f"instead (correct, but slow): {error}. Install where a C++20 compiler (g++ or clang) "
            "is found, or set NORMWISE_BACKEND=reference to silence this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, f"the extension is not built: {error}"
    _native.set_parallel_for(_torch_parallel_for())
    _native.set_thread_count(_torch_symbol("torch_get_num_threads"))
    return _native, ""


def _torch_symbol(name: str) -> int:
    """Address of a symbol of torch's stable C interface (since 2.10), or 0."""
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


def _torch_parallel_for() -> int:
    """Torch's own thread pool: ``torch.set_num_threads`` is obeyed and no second pool competes.
    Without it (0) the kernels run on the calling thread."""
    return _torch_symbol("torch_parallel_for")


_native, _why_not = _load()


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
        try:
            yield
        finally:
            _native = native
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


def _dense(x: Tensor, channel_dim: int) -> tuple[Tensor, tuple[int, int, int]]:
    block = geometry(x, channel_dim)
    if block is None:
        x = densify(x)
        block = geometry(x, channel_dim)
        assert block is not None
    return x, block


def _vector(v: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A per-channel vector as (the tensor, to keep it alive; its address; its dtype code)."""
    if v is None:
        return None, 0, 0
    if v.dtype not in _DTYPE:
        v = v.to(torch.float64)
    if not v.is_contiguous():
        v = v.contiguous()
    return v, v.data_ptr(), _DTYPE[v.dtype]


def _like(t: Tensor | None, x: Tensor) -> tuple[Tensor | None, int]:
    """A tensor of x's shape in x's layout and dtype, with its address."""
    if t is None:
        return None, 0
    t = match(t, x)
    return t, t.data_ptr()


def _serves(x: Tensor, mask: Tensor | None, *others: Tensor | None) -> bool:
    """Whether the kernels take the call: x of a known dtype with elements, no mask, all on CPU."""
    if _native is None or mask is not None or x.dtype not in _DTYPE or x.numel() == 0:
        return False
    return all(t is None or t.is_cpu for t in others)


def moments(x: Tensor, mask: Tensor | None, channel_dim: int) -> Tensor:
    if not _serves(x, mask):
        return NotImplemented
    x, block = _dense(x, channel_dim)
    out = torch.empty((3, block[1]), dtype=torch.float64)
    _native.moments(x.data_ptr(), *block, _DTYPE[x.dtype], out.data_ptr())
    return out


def _forward(
    x: Tensor,
    moments: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    block: tuple[int, int, int],
    eps: float,
    activation: str,
) -> Tensor:
    act = parse(activation)
    y = torch.empty_like(x)
    weight, w, w_dtype = _vector(weight)
    bias, b, b_dtype = _vector(bias)
    mean, m, m_dtype = _vector(mean)
    var, v, v_dtype = _vector(var)
    residual, r = _like(residual, x)
    out = 0 if moments is None else moments.data_ptr()
    # fmt: off
    _native.forward(
        x.data_ptr(), y.data_ptr(), r, *block, _DTYPE[x.dtype], w, w_dtype, b, b_dtype, eps,
        act.code, act.slope, out, m, m_dtype, v, v_dtype,
    )
    # fmt: on
    return y


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
) -> Tensor:
    if not _serves(x, mask, mean, var, weight, bias, residual):
        return NotImplemented
    x, block = _dense(x, channel_dim)
    return _forward(x, None, mean, var, weight, bias, residual, block, eps, activation)


def train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    if not _serves(x, mask, weight, bias, residual):
        return NotImplemented
    x, block = _dense(x, channel_dim)
    moments = torch.empty((3, block[1]), dtype=torch.float64)
    y = _forward(x, moments, None, None, weight, bias, residual, block, eps, activation)
    return y, moments


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    nonfinite_batches: Tensor | None,
    moments: Tensor,
    momentum: float | None,
    nonfinite: str,
) -> None:
    buffers = (running_mean, running_var)
    counters = (num_batches_tracked, nonfinite_batches)
    if (
        _native is None
        or moments.dtype != torch.float64
        or not moments.is_contiguous()
        or not all(t.is_cpu and t.dtype in _DTYPE and t.is_contiguous() for t in buffers)
        or not all(t is None or (t.is_cpu and t.dtype == torch.int64) for t in counters)
        or nonfinite == "raise"
    ):
        return NotImplemented
    # fmt: off
    _native.update_running(
        running_mean.shape[0], moments.data_ptr(),
        running_mean.data_ptr(), _DTYPE[running_mean.dtype],
        running_var.data_ptr(), _DTYPE[running_var.dtype],
        0 if num_batches_tracked is None else num_batches_tracked.data_ptr(),
        0 if nonfinite_batches is None else nonfinite_batches.data_ptr(),
        -1.0 if momentum is None else momentum, nonfinite == "skip",
    )
    # fmt: on
    return None


def _backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    sums: Tensor | None,
    count: float,
    block: tuple[int, int, int],
    eps: float,
    activation: str,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    act = parse(activation)
    dy, g = _like(dy, x)
    weight, w, w_dtype = _vector(weight)
    bias, b, b_dtype = _vector(bias)
    mean, m, m_dtype = _vector(mean)
    var, v, v_dtype = _vector(var)
    if act.code == 0 or output is not None:
        residual = None  # the derivative does not need it
    residual, r = _like(residual, x)
    output, o = _like(output if act.code and act.from_output else None, x)
    # fmt: off
    _native.backward(
        g, x.data_ptr(), r, o,
        0 if dx is None else dx.data_ptr(), 0 if dresidual is None else dresidual.data_ptr(),
        *block, _DTYPE[x.dtype], w, w_dtype, b, b_dtype, eps, act.code, act.slope,
        0 if moments is None else moments.data_ptr(), m, m_dtype, v, v_dtype,
        0 if sums is None else sums.data_ptr(), count,
        0 if dweight is None else dweight.data_ptr(), 0 if dbias is None else dbias.data_ptr(),
    )
    # fmt: on


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
) -> Tensor:
    if not _serves(x, mask, dy, mean, var, weight, bias, residual):
        return NotImplemented
    x, block = _dense(x, channel_dim)
    sums = torch.empty((2, block[1]), dtype=torch.float64)
    # fmt: off
    _backward(
        dy, x, None, mean, var, weight, bias, residual, output, None, None, sums, 0.0, block, eps,
        activation,
    )
    # fmt: on
    return sums


def _no_gradient(x: Tensor) -> Tensor:
    return x.new_empty((0,))


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
) -> tuple[Tensor, Tensor]:
    per_channel_count = count is not None and count.numel() != 1
    if per_channel_count or not _serves(x, mask, dy, mean, var, weight, bias, residual):
        return NotImplemented
    x, block = _dense(x, channel_dim)
    n = float(block[0] * block[2]) if count is None else float(count)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if residual_gradient else None
    if sums is not None:
        sums = sums.to(torch.float64).contiguous()
    # fmt: off
    _backward(
        dy, x, None, mean, var, weight, bias, residual, output, dx, dresidual, sums, n, block, eps,
        activation,
    )
    # fmt: on
    return dx, _no_gradient(x) if dresidual is None else dresidual


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if (
        moments.dtype != torch.float64
        or not moments.is_contiguous()
        or not all(p is None or (p.dtype in _DTYPE and p.is_contiguous()) for p in (weight, bias))
        or not _serves(x, mask, dy, moments, weight, bias, residual)
    ):
        return NotImplemented
    x, block = _dense(x, channel_dim)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if residual_gradient else None
    dweight = _no_gradient(x) if weight is None else torch.empty_like(weight)
    dbias = _no_gradient(x) if bias is None else torch.empty_like(bias)
    # fmt: off
    _backward(
        dy, x, moments, None, None, weight, bias, residual, output, dx, dresidual, None, 0.0, block,
        eps, activation, dweight, dbias,
    )
    # fmt: on
    return dx, _no_gradient(x) if dresidual is None else dresidual, dweight, dbias
