"""Argument checks of the functional forms: the fast path compares, the slow path explains."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.errors import DtypeError, InputError, message

__all__ = ["NONFINITE", "check_batch_norm", "check_enough_values", "check_policy"]

NONFINITE = ("propagate", "skip", "raise")


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _explain_vector(name: str, v: Tensor | None, x: Tensor, axis: int) -> None:
    want = (x.shape[axis],)
    if v is None or v.shape == want:
        return
    raise InputError(
        message(
            f"{name} has one value for each channel, shape {tuple(want)}",
            f"{name} of shape {_shape(v)} for an input of shape {_shape(x)}, whose channel axis is "
            f"{axis}",
            f"num_features={want[0]}, or channel_dim= if the channels lie on another axis",
        )
    )


def check_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    training: bool,
    eps: float,
) -> int:
    """Check everything that can be checked from shapes and dtypes; the channel axis from 0."""
    rank = x.dim()
    if not -rank <= channel_dim < rank:
        raise InputError(
            message(
                "channel_dim names an axis of the input",
                f"channel_dim={channel_dim} for an input of shape {_shape(x)}",
                f"a number from {-rank} to {rank - 1}" if rank else "an input of rank 2 or more",
            )
        )
    if rank < 2:
        raise InputError(
            message(
                "batch norm takes an input of rank 2 or more, (N, C, …)",
                f"shape {_shape(x)}",
                "x.unsqueeze(0) for a single sample",
            )
        )
    axis = channel_dim + rank if channel_dim < 0 else channel_dim
    if not x.is_floating_point():
        raise DtypeError(
            message(
                "batch norm takes float64, float32, bfloat16 or float16",
                f"an input of dtype {x.dtype}",
                "x.float()",
            )
        )
    want = (x.shape[axis],)
    if (
        (weight is not None and weight.shape != want)
        or (bias is not None and bias.shape != want)
        or (running_mean is not None and running_mean.shape != want)
        or (running_var is not None and running_var.shape != want)
    ):
        _explain_vector("running_mean", running_mean, x, axis)
        _explain_vector("running_var", running_var, x, axis)
        _explain_vector("weight", weight, x, axis)
        _explain_vector("bias", bias, x, axis)
    if not training and (running_mean is None or running_var is None):
        raise InputError(
            message(
                "with training=False the running statistics normalize",
                "running_mean or running_var None",
                "training=True to normalize by the batch",
            )
        )
    if (running_mean is None) != (running_var is None):
        raise InputError(
            message(
                "running_mean and running_var come together",
                "one of them None",
                "pass both, or neither",
            )
        )
    if not (eps > 0 or (eps == 0 and not training)):  # NaN is neither
        raise InputError(
            message(
                "eps must be positive (in eval mode it may be 0): it keeps a channel of variance 0 "
                "from a division by 0",
                f"eps={eps}",
                "eps=1e-5, the default of torch.nn",
            )
        )
    if residual is not None and residual.shape != x.shape:
        raise InputError(
            message(
                "residual has the shape of the input: it is added before the activation",
                f"residual {_shape(residual)}, input {_shape(x)}",
                "residual.expand_as(x), or bring the shortcut to the input's shape",
            )
        )
    if residual is not None and not residual.is_floating_point():
        raise DtypeError(
            message(
                "residual is a floating tensor", f"dtype {residual.dtype}", "residual.to(x.dtype)"
            )
        )
    if mask is not None:
        _check_mask(mask, x, axis)
    return axis


def _check_mask(mask: Tensor, x: Tensor, axis: int) -> None:
    if mask.dtype != torch.bool:
        raise DtypeError(
            message("mask is boolean, True where an element counts", f"{mask.dtype}", "mask.bool()")
        )
    fits = mask.dim() == x.dim() and all(
        m in (1, n) if d != axis else m == 1
        for d, (m, n) in enumerate(zip(mask.shape, x.shape, strict=False))
    )
    if not fits:
        want = tuple(1 if d == axis else n for d, n in enumerate(x.shape))
        raise InputError(
            message(
                "mask broadcasts over all axes but the channel's, where it has size 1",
                f"mask {_shape(mask)}, input {_shape(x)} with channel axis {axis}",
                f"mask.reshape(...) to {want}, or to 1 along axes that share a value",
            )
        )


def check_enough_values(x: Tensor, axis: int) -> None:
    """In training a channel needs two values or more: one value is its own mean, the output is
    bias whatever came in, and the unbiased variance is 0 / 0."""
    if x.numel() == x.shape[axis] != 0:
        raise InputError(
            message(
                "Expected more than 1 value per channel when training",
                f"input size {_shape(x)} with channel axis {axis}",
                "a larger batch (drop_last=True in the loader keeps a last batch of one away), "
                "model.eval(), or a norm that does not average over the batch",
            )
        )


def check_policy(
    nonfinite: str, momentum: float | None, running: Tensor | None, tracked: Tensor | None
) -> None:
    """How the running statistics move: a known policy, and a momentum or a counter."""
    if nonfinite not in NONFINITE:
        raise InputError(
            message("nonfinite names a policy", repr(nonfinite), f"one of {NONFINITE}")
        )
    if momentum is None and running is not None and tracked is None:
        raise InputError(
            message(
                "momentum=None is the cumulative average, 1 / num_batches_tracked",
                "momentum=None without num_batches_tracked",
                "a number (torch.nn's default is 0.1), or num_batches_tracked=torch.tensor(0)",
            )
        )
