"""Batch norm problems: tensors in every layout and dtype, and how near to the oracle is right."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from oracle import ACTIVATIONS, Array, BatchNorm
from torch import Tensor

# The relative error of one rounding, in the dtype that is stored and in the one computed with.
ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
DTYPES = tuple(ROUNDING)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")

# How many roundings an elementwise result may be off, and a sum over a channel. In float64 the
# statistics are no more exact than the rest, so every result is a sum.
ELEMENT, SUM = 8, 24


def compute_rounding(dtype: torch.dtype) -> float:
    return ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32]


def array(t: Tensor | None) -> Any:
    """The values of a tensor in float64 NumPy, exactly."""
    return None if t is None else t.detach().double().resolve_neg().numpy()


def lay_out(values: Tensor, layout: str, channel_dim: int = 1) -> Tensor:
    """The same values with other strides: the channel innermost, axes reversed, or with gaps."""
    rank = values.dim()
    if layout == "contiguous":
        return values.contiguous()
    if layout == "sliced":
        room = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 3), torch.nan)
        view = room[..., 3::2][..., : values.shape[-1]]
        return view.copy_(values)
    if layout == "channels_last":
        order = [*(d for d in range(rank) if d != channel_dim), channel_dim]
    else:
        assert layout == "transposed"
        order = list(range(rank))[::-1]
    inverse = [order.index(d) for d in range(rank)]
    return values.permute(order).contiguous().permute(inverse)


@dataclass(frozen=True)
class Case:
    """One problem in words; ``tensors()`` draws it."""

    shape: tuple[int, ...]
    channel_dim: int = 1
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    parameters: tuple[str, ...] = ("weight", "bias")
    parameter_dtype: torch.dtype | None = None
    residual: str | None = None  # its layout
    dy_layout: str | None = None  # that of x
    mask: bool = False
    activation: str = "none"
    offset: float = 0.0
    scale: float = 1.0
    eps: float = 1e-5

    def tensors(self) -> Problem:
        return Problem(self)


class Problem:
    """The tensors of a case, and what the operators' arguments are."""

    def __init__(self, case: Case) -> None:
        self.case = case
        g = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        channels, axis = case.shape[case.channel_dim], case.channel_dim

        def whole(values: Tensor, layout: str) -> Tensor:
            return lay_out(values.to(case.dtype), layout, axis)

        spread = [1] * len(case.shape)
        spread[axis] = channels
        # Channels differ in scale, in offset and in sign of the weight.
        scale = torch.rand(channels, generator=g, dtype=torch.float64) + 0.5
        offset = case.offset + scale * draw((channels,))
        x = draw(case.shape) * scale.reshape(spread) + offset.reshape(spread)
        self.x = whole(x * case.scale, case.layout)
        own = case.parameter_dtype or case.dtype
        weight, bias = 1 + 0.7 * draw((channels,)), 0.5 * draw((channels,))
        self.weight = weight.to(own) if "weight" in case.parameters else None
        self.bias = bias.to(own) if "bias" in case.parameters else None
        residual, dy = draw(case.shape), draw(case.shape)
        self.residual = None if case.residual is None else whole(residual, case.residual)
        self.mask = None
        if case.mask:
            shape = tuple(1 if d == axis else n for d, n in enumerate(case.shape))
            self.mask = torch.rand(shape, generator=g) < 0.7
        # Statistics as a layer in eval mode remembers them: near the data's, but not equal.
        self.mean = ((offset + 0.1 * draw((channels,))) * case.scale).float()
        self.var = ((scale * case.scale) ** 2 * (0.8 + 0.4 * torch.rand(channels, generator=g))).to(
            torch.float32
        )
        self.dy = whole(dy, case.dy_layout or case.layout)
        # Where rounding decides on which side of an activation's kink z falls, nothing flows back.
        for training in (True, False) if ACTIVATIONS[case.activation][2] else ():
            call = self.oracle(training)
            largest = np.abs(call.before_activation).max(initial=0)
            width = 16 * compute_rounding(case.dtype) * (1 + largest) + 8 * ROUNDING[case.dtype]
            self.dy.masked_fill_(torch.from_numpy(call.near_kink(width)), 0)

    @property
    def channels(self) -> int:
        return self.case.shape[self.case.channel_dim]

    @property
    def count(self) -> int:
        return prod(self.case.shape) // max(self.channels, 1)

    def oracle(self, training: bool = True) -> BatchNorm:
        return BatchNorm(
            array(self.x),
            array(self.weight),
            array(self.bias),
            array(self.residual),
            None if self.mask is None else self.mask.numpy(),
            self.case.channel_dim,
            self.case.eps,
            self.case.activation,
            None if training else (array(self.mean), array(self.var)),
        )


def per_channel(values: Array, channel_dim: int) -> Array:
    """The largest magnitude of each channel, shaped to broadcast."""
    if not values.size:
        return np.zeros(())
    others = tuple(d for d in range(values.ndim) if d != channel_dim)
    largest: Array = np.abs(values).max(axis=others, keepdims=True)
    return largest


def assert_near(
    actual: Tensor,
    expected: Array,
    scale: Array | float,
    roundings: float = ELEMENT,
    computed: torch.dtype | None = None,
) -> None:
    """|actual - expected| is at most ``roundings`` of ``scale``, and one of storing the result."""
    assert tuple(actual.shape) == expected.shape
    stored = ROUNDING[actual.dtype]
    unit = compute_rounding(computed or actual.dtype)
    if unit == ROUNDING[torch.float64]:
        roundings = max(roundings, SUM)
    # 2**-24 is half of float16's smallest step.
    smallest = 2.0**-25 if actual.dtype == torch.float16 else 0.0
    allowed = roundings * unit * scale + 1.001 * stored * np.abs(expected) + smallest
    error = np.abs(array(actual) - expected)
    worst = error - allowed
    # Not `error <= allowed`.all() alone: NaN must fail, and the message shall say by how much.
    assert np.isfinite(error).all(), "not finite where the oracle is"
    if worst.size and worst.max() > 0:
        at = np.unravel_index(worst.argmax(), worst.shape)
        limit = np.broadcast_to(allowed, error.shape)[at]
        raise AssertionError(
            f"at {tuple(map(int, at))}: {array(actual)[at]!r}, expected {expected[at]!r}; "
            f"error {error[at]:.3g}, allowed {limit:.3g}"
        )
