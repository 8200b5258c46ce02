"""How a tensor lies in memory, as the kernels see it: ``(outer, channels, inner)``, contiguous.

Every dense tensor, whatever the order of its axes, is such a block once the axes are sorted by
stride: NCHW is ``(N, C, H*W)``, channels_last is ``(N*H*W, C, 1)``, a transposed ``(N, L, C)`` view
of an ``(N, C, L)`` tensor is ``(N, C, L)`` again.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Geometry", "densify", "geometry", "match"]


class Geometry(NamedTuple):
    """Element ``(o, c, i)`` lies at offset ``(o * channels + c) * inner + i``."""

    outer: int
    channels: int
    inner: int


# Training repeats a few dozen shapes for ever; the cache turns 5 us of sorting into 0.3 us.
@lru_cache(maxsize=4096)
def _geometry(shape: torch.Size, stride: tuple[int, ...], channel_dim: int) -> Geometry | None:
    if 0 in shape:
        return Geometry(0, shape[channel_dim], 1)
    order = sorted(
        (d for d in range(len(shape)) if shape[d] != 1), key=lambda d: stride[d], reverse=True
    )
    expected = 1
    for d in reversed(order):
        if stride[d] != expected:
            return None
        expected *= shape[d]
    channels = shape[channel_dim]
    if channels == 1:
        # One channel: the whole block is its slice, wherever the axis stands.
        return Geometry(1, 1, prod(shape))
    at = order.index(channel_dim)
    return Geometry(
        prod(shape[d] for d in order[:at]), channels, prod(shape[d] for d in order[at + 1 :])
    )


def geometry(x: Tensor, channel_dim: int) -> Geometry | None:
    """The block that ``x`` is in memory, or None if it is strided with gaps or overlaps."""
    return _geometry(x.shape, x.stride(), channel_dim)


def densify(x: Tensor) -> Tensor:
    """A dense copy of ``x`` that keeps the order of its axes in memory."""
    return torch.empty_like(x).copy_(x)


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
