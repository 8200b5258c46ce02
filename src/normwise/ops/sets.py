"""The C++ kernels of layer, RMS, group and instance norm.

As in :mod:`normwise.ops.cpu`, NotImplemented says that the kernels do not serve the call; the
direct forms, which are no operators, return None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise.activations import parse
from normwise.ops import cpu

__all__ = ["direct_backward", "direct_forward", "sets_backward", "sets_forward"]

View = tuple[int, int, int, int]


# Whole eager calls (csrc/binding_sets.h). `direct_forward`: (x, weight, bias, residual, spec, eps,
# activation's code, its slope, centred, recorded) -> y, or (y, moments) if backward shall
# have them, where spec is normalized_shape, or how many groups the
# channels of axis 1 make. `direct_backward`: (dy, saved tensors, options) -> the gradients of the
# node's arguments, of which the first four are x, weight, bias, residual. Both are None for a call
# on other than plain, contiguous, fitting tensors.
direct_forward: Any = cpu._unavailable if cpu._native is None else cpu._native.direct_forward
direct_backward: Any = cpu._unavailable if cpu._native is None else cpu._native.direct_backward


def _new_moments(sets: int) -> Tensor:
    return torch.empty((3, sets), dtype=torch.float64)


if cpu._native is not None:
    cpu._native.set_new_moments(_new_moments)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _foreign(x: Tensor, *others: Tensor | None) -> bool:
    """Whether another tensor of x's size is in a dtype of its own."""
    return any(t is not None and t.dtype != x.dtype for t in others)


def sets_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    view: View,
    eps: float,
    activation: str,
    centred: bool,
) -> Any:
    if cpu._native is None or _foreign(x, residual) or cpu._negated(x, residual, weight, bias):
        return NotImplemented
    x = x.contiguous()
    y = torch.empty_like(x)
    moments = _new_moments(view[0] * view[1])
    act = parse(activation)
    done = cpu._native.sets_forward(
        x, cpu._vector(weight), cpu._vector(bias), _contiguous(residual), y, moments, *view, eps,
        act.code, act.slope, centred,
    )  # fmt: skip
    return (y, moments) if done else NotImplemented


def sets_backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    view: View,
    eps: float,
    activation: str,
    centred: bool,
    residual_gradient: bool,
) -> Any:
    if (
        cpu._native is None
        or _foreign(x, dy, residual, output)
        or dy.is_neg()
        or cpu._negated(x, residual, weight, bias)
    ):
        return NotImplemented
    act = parse(activation)
    residual, output = cpu._derivative_from(activation, residual, output)
    result = cpu._native.sets_backward(
        dy.contiguous(), x.contiguous(), moments, _contiguous(weight), _contiguous(bias),
        _contiguous(residual), _contiguous(output), residual_gradient, *view, eps, act.code,
        act.slope, centred,
    )  # fmt: skip
    return NotImplemented if result is None else result
