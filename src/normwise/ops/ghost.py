"""The C++ training kernels over ghost batches, one after another in one native call.

As in :mod:`normwise.ops.cpu`, NotImplemented says that the kernels do not serve the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise.activations import parse
from normwise.layout import densify, match
from normwise.ops import cpu

__all__ = ["ghost_backward", "ghost_forward"]


def _plain(x: Tensor) -> bool:
    """An eager call on a plain CPU tensor, which needs no dispatcher."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.is_cpu
        and not torch._C._len_torch_dispatch_stack()
    )


def ghost_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    size: int,
    channel_dim: int,
    batch_dim: int,
    eps: float,
    activation: str,
) -> Any:
    """`train_forward` of ``size`` samples at a time: y, the moments of each ghost batch (G, 3, C)
    and of all (3, C); NotImplemented where the batch axis is not the outermost in memory."""
    if cpu._native is None or not _plain(x) or cpu._negated(x, residual, weight, bias):
        return NotImplemented
    act = parse(activation)
    y, whole = torch.empty_like(x), cpu._rows(3, x, channel_dim)
    ghosts = -(-x.shape[batch_dim] // size)
    moments = whole.new_empty((ghosts, *whole.shape))
    end = (size, channel_dim, batch_dim, eps, act.code, act.slope)
    if cpu._native.ghost_forward(x, y, moments, whole, weight, bias, residual, *end):
        return y, moments, whole
    x = densify(x)
    done = cpu._native.ghost_forward(
        x, y, moments, whole, cpu._vector(weight), cpu._vector(bias), cpu._like(residual, x), *end
    )
    return (y, moments, whole) if done else NotImplemented


def ghost_backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    size: int,
    channel_dim: int,
    batch_dim: int,
    eps: float,
    activation: str,
    residual_gradient: bool,
) -> Any:
    """`train_backward` of each ghost batch: dx, dresidual, and the gradients of weight and bias
    over all of them, (2, C)."""
    if cpu._native is None or not _plain(dy) or dy.is_neg():
        return NotImplemented
    act = parse(activation)
    residual, output = cpu._derivative_from(activation, residual, output)
    dx, parameters = torch.empty_like(x), cpu._rows(2, x, channel_dim)
    dresidual = torch.empty_like(x) if residual_gradient else None
    results = (dx, dresidual, torch.empty_like(parameters), parameters)
    end = (size, channel_dim, batch_dim, eps, act.code, act.slope)
    if cpu._native.ghost_backward(dy, x, moments, weight, bias, residual, output, *results, *end):
        return dx, dresidual, parameters
    x = densify(x)
    done = cpu._native.ghost_backward(
        match(dy, x), x, moments, cpu._vector(weight), cpu._vector(bias), cpu._like(residual, x),
        cpu._like(output, x), *results, *end,
    )  # fmt: skip
    return (dx, dresidual, parameters) if done else NotImplemented
