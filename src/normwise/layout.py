"""How tensors lie in memory: dense copies, and operands brought into the layout of another.

The kernels take any dense block, whatever the order of its axes (csrc/operands.h): NCHW,
channels_last, a transposed ``(N, L, C)`` view of an ``(N, C, L)`` tensor. What is strided with gaps
or lies otherwise than its partner is copied first.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["densify", "match"]


def densify(x: Tensor) -> Tensor:
    """``x`` without gaps, the order of its axes in memory kept; ``x`` itself if it has none."""
    dense = torch.empty_like(x)
    return x if dense.stride() == x.stride() else dense.copy_(x)


def match(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the layout and dtype of ``like`` (same shape); ``x`` itself if it is already."""
    if x.dtype == like.dtype:
        ours, theirs = x.stride(), like.stride()
        # The stride of an axis of size 1 says nothing about memory.
        if ours == theirs or all(
            a == b for n, a, b in zip(x.shape, ours, theirs, strict=True) if n != 1
        ):
            return x
    return torch.empty_like(like).copy_(x)
