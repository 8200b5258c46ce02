"""Argument checks of layer, group, instance and RMS norm; exceptions are torch.nn's own types."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from normwise.activations import ACTIVATIONS, parse
from normwise.errors import DtypeError, InputError, message

__all__ = ["check_channels", "check_common", "check_vector", "normalized_axes"]


def check_common(
    name: str, x: Tensor, residual: Tensor | None, eps: float, activation: str | None
) -> str:
    """What every norm asks of its input, residual, eps and activation; the activation's name."""
    if not x.is_floating_point():
        raise DtypeError(
            message(
                f"{name} takes float64, float32, bfloat16 or float16",
                f"an input of dtype {x.dtype}",
                "x.float()",
            )
        )
    if not eps >= 0:  # NaN is not
        raise InputError(
            message("eps is added to a variance and is not negative", f"eps={eps}", "eps=1e-5")
        )
    if residual is not None and residual.shape != x.shape:
        raise InputError(
            message(
                "residual has the shape of the input: it is added before the activation",
                f"residual {tuple(residual.shape)}, input {tuple(x.shape)}",
                "residual.expand_as(x), or bring the shortcut to the input's shape",
            )
        )
    if residual is not None and not residual.is_floating_point():
        raise DtypeError(
            message(
                "residual is a floating tensor", f"dtype {residual.dtype}", "residual.to(x.dtype)"
            )
        )
    if activation is None:
        return "none"
    if activation not in ACTIVATIONS:
        parse(activation)
    return activation


def normalized_axes(x: Tensor, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """The trailing axes that are averaged over, as a shape; checked against the input's."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape:
        raise InputError(
            message(
                "Expected normalized_shape to be at least 1-dimensional",
                "an empty one",
                f"({x.shape[-1]},), the last axis" if x.dim() else "an input of rank 1 or more",
            )
        )
    if x.dim() < len(shape) or tuple(x.shape[x.dim() - len(shape) :]) != shape:
        raise InputError(
            message(
                f"Given normalized_shape={list(shape)}, expected input with shape "
                f"[*, {', '.join(map(str, shape))}]",
                f"input of size {list(x.shape)}",
                "the sizes of the last axes, or x.movedim(...) if the features lie elsewhere",
            )
        )
    return shape


def check_vector(name: str, v: Tensor | None, shape: tuple[int, ...], what: str) -> None:
    if v is not None and tuple(v.shape) != shape:
        raise InputError(
            message(
                f"Expected {name} to be {what}",
                f"{name} of shape {list(v.shape)} where {list(shape)} is wanted",
                f"{name}.reshape{shape}"
                if v.numel() == prod(shape)
                else "a layer built for this input",
            )
        )


def check_channels(name: str, x: Tensor, channel_dim: int) -> int:
    """The channel axis from 0 of an input ``(N, C, *)`` or with its channels elsewhere."""
    rank = x.dim()
    if rank < 2:
        raise InputError(
            message(
                f"Expected at least 2 dimensions for input tensor of {name}",
                f"{rank} in the shape {tuple(x.shape)}",
                "x.unsqueeze(0) for a single sample",
            )
        )
    if not -rank <= channel_dim < rank or channel_dim in (0, -rank):
        raise InputError(
            message(
                "channel_dim names an axis of the input that is not the batch's, axis 0",
                f"channel_dim={channel_dim} for an input of shape {tuple(x.shape)}",
                f"a number from 1 to {rank - 1}, or -1 for the last axis",
            )
        )
    return channel_dim + rank if channel_dim < 0 else channel_dim
