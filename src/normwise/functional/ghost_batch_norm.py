"""``ghost_batch_norm``: every ``ghost_size`` samples are normalized as a batch of their own.

On the CPU the training kernels run over one ghost batch after another in one native call. Masks,
transforms, compilers and other devices lay the ghost batches beside one another as channels, which
costs copies; every operation then serves all of them at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise import ops
from normwise.activations import parse
from normwise.errors import InputError, message
from normwise.functional.autograd import to_keep, transformed
from normwise.functional.batch_norm import batch_norm
from normwise.functional.by_moments import move_running, normalize_by_moments, packed_moments
from normwise.functional.checks import check_batch_norm, check_enough_values, check_policy
from normwise.moments import Moments
from normwise.ops import reference

__all__ = ["check_ghost_size", "ghost_batch_norm"]


def check_ghost_size(ghost_size: int) -> None:
    """A whole number of samples, 1 or more."""
    if isinstance(ghost_size, bool) or not isinstance(ghost_size, int) or ghost_size < 1:
        raise InputError(
            message(
                "ghost_size is how many samples make a ghost batch, 1 or more",
                f"ghost_size={ghost_size!r}",
                "16 to 64, as in Hoffer et al. 2017",
            )
        )


class _GhostNorm(torch.autograd.Function):
    """``y``, which the kernels made of all ghost batches by their ``moments``: what is left is the
    backward, which goes through the moments."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        y: Tensor,
        moments: Tensor,
        size: int,
        channel_dim: int,
        batch_dim: int,
        eps: float,
        activation: str,
    ) -> Tensor:
        y = y.detach()
        ctx.save_for_backward(x, weight, bias, moments, *to_keep(activation, residual, y))
        ctx.options = (size, channel_dim, batch_dim, eps, activation)
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:4]
        x, weight, bias, moments, residual, output = ctx.saved_tensors
        nothing = (None,) * 7
        result: Any = NotImplemented
        if not torch.is_grad_enabled():
            tensors = (dy, x, moments, weight, bias, residual, output)
            options: Any = (*ctx.options, wanted[3])
            result = ops.ghost_backward(*tensors, *options)
        if result is NotImplemented:
            return *_again(dy, x, weight, bias, residual, output, ctx.options, wanted), *nothing
        dx, dresidual, parameters = result
        dweight, dbias = (
            parameters[i].to(dtype, copy=True) if dtype is not None and wanted[i + 1] else None
            for i, dtype in enumerate(ctx.dtypes)
        )
        return (
            dx if wanted[0] else None,
            dweight,
            dbias,
            dresidual if wanted[3] else None,
            *nothing,
        )


def _again(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    options: tuple[int, int, int, float, str],
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients by differentiable operations (create_graph=True, odd cotangents)."""
    create = torch.is_grad_enabled()
    size, channel_dim, batch_dim, eps, activation = options
    with torch.enable_grad():
        y, _ = _beside(x, weight, bias, None, None, size, channel_dim, batch_dim, eps, "none")
        act = parse(activation)
        if output is not None:
            dz = dy * act.derivative(output)
        elif act.name == "none":
            dz = dy
        else:
            dz = dy * act.derivative(y if residual is None else y + residual)
        candidates = (x, weight, bias)
        inputs = [t for t, w in zip(candidates, wanted, strict=False) if t is not None and w]
        found = iter(torch.autograd.grad(y, inputs, dz, create_graph=create) if inputs else ())
    return [next(found) if w else None for w in wanted[:3]] + [dz if wanted[3] else None]


def _beside(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    size: int,
    channel_dim: int,
    batch_dim: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(y, moments of the whole batch): (size, G * C, …), each ghost batch has channels of its own.

    A remainder is filled up with samples that a mask leaves out.
    """
    samples, channels = x.shape[batch_dim], x.shape[channel_dim]
    ghosts = -(-samples // size)
    lacking = ghosts * size - samples
    if lacking and mask is None:
        mask = torch.ones((1,) * x.dim(), dtype=torch.bool, device=x.device)
    if lacking and mask is not None and mask.shape[batch_dim] == 1:
        mask = mask.expand([samples if d == batch_dim else -1 for d in range(x.dim())])

    def beside(t: Tensor) -> Tensor:
        t = t.movedim((batch_dim, channel_dim), (0, 1))
        if t.shape[0] == 1 != samples:  # a mask that all samples share
            t = t.expand(samples, *t.shape[1:])
        if lacking:
            t = torch.cat([t, t.new_zeros((lacking, *t.shape[1:]))])
        t = t.reshape(ghosts, size, *t.shape[1:]).transpose(0, 1)
        t = t.expand(size, ghosts, channels, *t.shape[3:])
        return t.reshape(size, ghosts * channels, *t.shape[3:])

    def repeated(v: Tensor | None) -> Tensor | None:
        return None if v is None else v.repeat(ghosts)

    laid = (
        beside(x),
        repeated(weight),
        repeated(bias),
        None if residual is None else beside(residual),
        None if mask is None else beside(mask),
    )
    if not torch.compiler.is_compiling() and transformed():
        y, moments = reference.train_forward(*laid, 1, eps, activation)
    else:
        moments = packed_moments(laid[0], laid[4], 1)
        y = normalize_by_moments(*laid, moments, 1, eps, activation)
    y = y.reshape(size, ghosts, channels, *y.shape[2:]).transpose(0, 1)
    y = y.reshape(ghosts * size, *y.shape[2:])[:samples]
    y = reference.in_layout_of(x, y.movedim((0, 1), (batch_dim, channel_dim)))
    count, mean, m2 = moments.detach().reshape(3, ghosts, channels).unbind(0)
    whole = Moments(count, mean, m2).reduce(0)
    return y, torch.stack([whole.count.to(mean.dtype), whole.mean, whole.m2])


def ghost_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    ghost_size: int,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    channel_dim: int = 1,
    num_batches_tracked: Tensor | None = None,
    nonfinite: str = "propagate",
    nonfinite_batches: Tensor | None = None,
) -> Tensor:
    """Training batch norm of every ``ghost_size`` samples by themselves (Hoffer et al. 2017).

    ``y = torch.cat([batch_norm(part) for part in input.split(ghost_size)])``; the last may be
    smaller. The running statistics take in the moments of the whole batch: the ghost batches',
    merged exactly. Other arguments and errors as in :func:`~normwise.functional.batch_norm`; the
    batch axis is 0 (1, where the channels are axis 0).
    """
    axis = check_batch_norm(
        input, running_mean, running_var, weight, bias, residual, mask, channel_dim, True, eps
    )
    check_ghost_size(ghost_size)
    batch_dim = 0 if axis else 1
    samples = input.shape[batch_dim]
    if ghost_size >= samples:  # one ghost batch is the batch
        return batch_norm(
            input, running_mean, running_var, weight, bias, True, momentum, eps, residual=residual,
            mask=mask, activation=activation, channel_dim=axis,
            num_batches_tracked=num_batches_tracked, nonfinite=nonfinite,
            nonfinite_batches=nonfinite_batches,
        )  # fmt: skip
    act = "none" if activation is None else activation
    parse(act)
    check_policy(nonfinite, momentum, running_mean, num_batches_tracked)
    if mask is None:
        smallest = samples % ghost_size or ghost_size
        check_enough_values(input.narrow(batch_dim, 0, smallest), axis)
    tail = (ghost_size, axis, batch_dim, eps, act)
    found: Any = NotImplemented
    if mask is None and not torch.compiler.is_compiling() and not transformed():
        with torch.no_grad():
            found = ops.ghost_forward(input, weight, bias, residual, *tail)
    if found is NotImplemented:
        y, whole = _beside(input, weight, bias, residual, mask, *tail)
    else:
        y, moments, whole = found
        if torch.is_grad_enabled():
            apply: Any = _GhostNorm.apply
            y = apply(input, weight, bias, residual, y, moments, *tail)
    move_running(
        running_mean, running_var, num_batches_tracked, nonfinite_batches, whole, momentum,
        nonfinite,
    )  # fmt: skip
    return y
