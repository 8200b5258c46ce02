"""Batch norm by moments that were taken before: of this batch alone, or merged over a group.

The split form of the training norm (moments, then normalize; reduce, then input gradient), for what
has to happen between: synchronised statistics, corrections that depend on the moments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise import ops
from normwise.functional import observer
from normwise.functional.autograd import to_keep, transformed
from normwise.functional.collectives import Who, gather, start_sum, summed
from normwise.moments import Moments
from normwise.ops import reference

__all__ = ["merge_over", "move_running", "normalize_by_moments", "packed_moments"]


def packed_moments(x: Tensor, mask: Tensor | None, axis: int) -> Tensor:
    """Moments of each channel as a constant, shape (3, C)."""
    with torch.no_grad():
        found: Tensor = ops.moments(x.detach(), mask, axis)
        return found


def move_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    nonfinite_batches: Tensor | None,
    moments: Tensor,
    momentum: float | None,
    nonfinite: str,
) -> None:
    """The running statistics take in a batch's moments, in place, as after a training step."""
    if running_mean is None or running_var is None:
        if nonfinite == "raise":
            reference.raise_if_nonfinite(moments)
        if tracked is not None:
            tracked.add_(1)  # torch.nn counts without running statistics too
        return
    # Under vmap every member moves its own: plain operations go through it.
    update = reference.update_running if transformed() else ops.update_running
    with torch.no_grad():
        update(
            running_mean, running_var, tracked, nonfinite_batches, moments.detach(), momentum,
            nonfinite,
        )  # fmt: skip


def _merged(rows: Tensor) -> Tensor:
    """(ranks, 2C + 1), each row a mean, an m2 and one count, -> moments of all, (3, C)."""
    channels = rows.shape[1] // 2
    mean, m2, count = rows.split([channels, channels, 1], dim=1)
    m = Moments(count, mean, m2).reduce(0)
    return torch.stack([m.count.to(mean.dtype).expand(channels), m.mean, m.m2])


def merge_over(moments: Tensor, group: Any, who: Who = None) -> Tensor:
    """Moments of all ranks' batches, (3, C), from this rank's: one gather of 2C + 1 numbers.

    One count goes with all channels, as a mask is the same for each. In float64, where a count is
    exact up to 2**53 and a merge loses no more than a sum does.
    """
    row = torch.cat([moments[1], moments[2], moments[0, :1]])
    return _merged(gather(row, group, who))


def _differentiable_moments(
    x: Tensor, mask: Tensor | None, axis: int, group: Any, who: Who
) -> Tensor:
    """The merged moments as functions of x, to any order: a gather written as a sum."""
    moments = reference.moments(x, mask, axis)
    if group is None:
        return moments
    import torch.distributed as dist

    row = torch.cat([moments[1], moments[2], moments[0, :1]])
    ranks, own = dist.get_world_size(group), dist.get_rank(group)
    rows = torch.stack([row if i == own else torch.zeros_like(row) for i in range(ranks)])
    return _merged(summed(rows, group, who))


class _MomentsNorm(torch.autograd.Function):
    """y by ``moments``, which are those of x (and of the other ranks' x, with a group): the
    backward goes through them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        moments: Tensor,
        channel_dim: int,
        eps: float,
        activation: str,
        group: Any,
        who: Who,
    ) -> Tensor:
        y = _normalize(x, weight, bias, residual, mask, moments, channel_dim, eps, activation)
        if not torch.compiler.is_compiling() and observer.LISTENERS:
            observer.notify(
                observer.Output(
                    y, x, (moments,), weight, bias, residual, mask, channel_dim, eps, activation
                )
            )
        ctx.save_for_backward(x, weight, bias, moments, *to_keep(activation, residual, y), mask)
        ctx.options = (channel_dim, eps, activation)
        ctx.group, ctx.who = group, who
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments, residual, output, mask = ctx.saved_tensors
        want_x, want_weight, want_bias, want_residual = ctx.needs_input_grad[:4]
        group, who, options = ctx.group, ctx.who, ctx.options
        backend: Any = ops
        again = torch.is_grad_enabled()
        if again:  # create_graph=True: differentiable operations, moments functions of x again
            backend = reference
            moments = _differentiable_moments(x, mask, options[0], group, who)
        mean, var = reference.mean_var(moments)
        common = (dy, x, mean, var, weight, bias, residual, output, mask)
        sums = backend.backward_reduce(*common, *options)
        dx = dresidual = None
        pending = None
        if group is not None and want_x and not again:
            pending = start_sum(sums, group, who)
        # This rank's share of the parameters' gradients, while the sum is under way.
        dweight, dbias = reference.parameter_gradients(sums, var, weight, bias, options[1])
        if want_x or want_residual:
            total = sums
            if pending is not None:
                total = pending.wait()
            elif group is not None and want_x:
                total = summed(sums, group, who)
            # Ghost batches beside one another differ in count where a mask is; else one count will
            # do, which is all that the kernels know.
            count = moments[0, :1] if mask is None else moments[0]
            dx, dresidual = backend.backward_input(*common, total, count, *options, want_residual)
        return (
            dx if want_x else None,
            dweight if want_weight else None,
            dbias if want_bias else None,
            dresidual if want_residual else None,
            None, None, None, None, None, None, None,
        )  # fmt: skip


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    moments: Tensor,
    channel_dim: int,
    eps: float,
    activation: str,
) -> Tensor:
    mean, var = reference.mean_var(moments)
    y: Tensor = ops.normalize(
        x, mean, var, weight, bias, residual, mask, channel_dim, eps, activation
    )
    return y


def normalize_by_moments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    moments: Tensor,
    channel_dim: int,
    eps: float,
    activation: str,
    group: Any = None,
    who: Who = None,
) -> Tensor:
    """y = activation(bn(x) + residual) by the moments of x, merged over ``group`` if there is one;
    differentiable in x (through the moments), weight, bias and residual."""
    arguments = (x, weight, bias, residual, mask, moments, channel_dim, eps, activation)
    if not torch.is_grad_enabled():
        return _normalize(*arguments)
    apply: Any = _MomentsNorm.apply
    y: Tensor = apply(*arguments, group, who)
    return y
