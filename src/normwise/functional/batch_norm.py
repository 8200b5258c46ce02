"""``batch_norm``: which statistics normalize, autograd, and how the running statistics move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise import ops
from normwise.activations import ACTIVATIONS, parse
from normwise.functional import observer
from normwise.functional.autograd import to_keep, transformed
from normwise.functional.checks import check_batch_norm, check_enough_values, check_policy
from normwise.moments import Moments
from normwise.ops import reference

__all__ = ["batch_moments", "batch_norm", "batch_norm_update"]


_NOTHING = (None, None, None)


def _train_step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    nonfinite_batches: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
    momentum: float | None,
    nonfinite: str,
) -> tuple[Tensor, Tensor]:
    """(y, moments) by the batch's statistics; the running ones move."""
    y, moments = ops.train_forward(x, weight, bias, residual, mask, channel_dim, eps, activation)
    if running_mean is not None:
        ops.update_running(
            running_mean, running_var, tracked, nonfinite_batches, moments, momentum, nonfinite
        )
    else:
        if nonfinite == "raise":
            reference.raise_if_nonfinite(moments)
        if tracked is not None:
            tracked.add_(1)  # torch.nn counts without running statistics too
    return y, moments


class _TrainingNorm(torch.autograd.Function):
    """`_train_step`, whose backward goes through the moments: they are functions of x.

    The running statistics move inside, so that only y is an output: each further output costs
    autograd 2 us.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        tracked: Tensor | None,
        nonfinite_batches: Tensor | None,
        channel_dim: int,
        eps: float,
        activation: str,
        momentum: float | None,
        nonfinite: str,
    ) -> Tensor:
        y, moments = _train_step(
            x, weight, bias, residual, mask, running_mean, running_var, tracked,
            nonfinite_batches, channel_dim, eps, activation, momentum, nonfinite,
        )  # fmt: skip
        if residual is None and mask is None:  # fewer names to save and unpack: 1 us
            ctx.save_for_backward(x, weight, bias, moments)
        else:
            kept = to_keep(activation, residual, y)
            ctx.save_for_backward(x, weight, bias, moments, *kept, mask)
        ctx.options = ops.autograd_options(
            x, weight, bias, residual, channel_dim, eps, activation, 14, True
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if ctx.options[-1]:
            gradients: tuple[Tensor | None, ...] | None = ops.train_gradients(
                dy, saved, ctx.options
            )
            if gradients is not None:
                return gradients
        wanted = ctx.needs_input_grad
        x, weight, bias, moments = saved[:4]
        residual, output, mask = saved[4:] or _NOTHING
        channel_dim, eps, activation = ctx.options[:3]
        backward = ops.train_backward
        if torch.is_grad_enabled():
            # create_graph=True: the same formulas in differentiable operations, with moments
            # that are functions of x again.
            moments = reference.moments(x, mask, channel_dim)
            backward = reference.train_backward
        dx, dresidual, dweight, dbias = backward(
            dy, x, moments, weight, bias, residual, output, mask, channel_dim, eps, activation,
            wanted[3],
        )  # fmt: skip
        return (
            dx if wanted[0] else None,
            dweight if wanted[1] else None,
            dbias if wanted[2] else None,
            dresidual if wanted[3] else None,
            None, None, None, None, None, None, None, None, None, None,
        )  # fmt: skip


class _ConstantNorm(torch.autograd.Function):
    """y with statistics that are constants, as in eval mode."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        mean: Tensor,
        var: Tensor,
        channel_dim: int,
        eps: float,
        activation: str,
    ) -> Tensor:
        y: Tensor = ops.normalize(
            x, mean, var, weight, bias, residual, mask, channel_dim, eps, activation
        )
        if residual is None and mask is None:
            ctx.save_for_backward(x, weight, bias, mean, var)
        else:
            kept = to_keep(activation, residual, y)
            ctx.save_for_backward(x, weight, bias, mean, var, *kept, mask)
        # The kernel that makes all gradients in one pass; frozen parameters need no sums.
        everything = x.requires_grad and weight is not None and weight.requires_grad
        ctx.options = ops.autograd_options(
            x, weight, bias, residual, channel_dim, eps, activation, 10, everything
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if ctx.options[-1]:
            gradients: tuple[Tensor | None, ...] | None = ops.eval_gradients(dy, saved, ctx.options)
            if gradients is not None:
                return gradients
        want_x, want_weight, want_bias, want_residual = ctx.needs_input_grad[:4]
        x, weight, bias, mean, var = saved[:5]
        residual, output, mask = saved[5:] or _NOTHING
        channel_dim, eps, activation = ctx.options[:3]
        backend: Any = reference if torch.is_grad_enabled() else ops
        common = (dy, x, mean, var, weight, bias, residual, output, mask)
        end = (channel_dim, eps, activation)
        dx = dresidual = dweight = dbias = None
        if not (want_weight or want_bias):  # no sums are needed
            dx, dresidual = backend.backward_input(*common, None, None, *end, want_residual)
        elif want_x or want_residual:
            dx, dresidual, dweight, dbias = backend.eval_backward(*common, *end, want_residual)
        else:
            sums = backend.backward_reduce(*common, *end)
            dweight, dbias = reference.parameter_gradients(
                sums, var.to(sums.dtype), weight, bias, eps
            )
        return (
            dx if want_x else None,
            dweight if want_weight else None,
            dbias if want_bias else None,
            dresidual if want_residual else None,
            None, None, None, None, None, None,
        )  # fmt: skip


class _ObservedTrainingNorm(_TrainingNorm):
    """`_TrainingNorm`, and somebody is told of y."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y = _TrainingNorm.forward(ctx, *arguments)
        x, weight, bias, residual, mask = arguments[:5]
        statistics = (ctx.to_save[3],)
        observer.notify(
            observer.Output(y, x, statistics, weight, bias, residual, mask, *arguments[9:12])
        )
        return y


class _ObservedConstantNorm(_ConstantNorm):
    """`_ConstantNorm`, and somebody is told of y."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y = _ConstantNorm.forward(ctx, *arguments)
        x, weight, bias, residual, mask = arguments[:5]
        observer.notify(
            observer.Output(y, x, arguments[5:7], weight, bias, residual, mask, *arguments[7:10])
        )
        return y


# Function.apply binds the signature and looks for dead functorch wrappers in Python (4 us); eager
# calls go to the C++ half directly. Compilers must see the class's own apply.
_apply_training = super(torch.autograd.Function, _TrainingNorm).apply
_apply_constant = super(torch.autograd.Function, _ConstantNorm).apply
_apply_observed_training = super(torch.autograd.Function, _ObservedTrainingNorm).apply
_apply_observed_constant = super(torch.autograd.Function, _ObservedConstantNorm).apply


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    channel_dim: int = 1,
    num_batches_tracked: Tensor | None = None,
    nonfinite: str = "propagate",
    nonfinite_batches: Tensor | None = None,
) -> Tensor:
    r"""Batch normalization (Ioffe & Szegedy 2015, algorithm 1), for each channel :math:`c`:

    .. math::
        y = \phi\Bigl(\frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}\,\gamma_c + \beta_c + r\Bigr)

    with :math:`\mu, \sigma^2` the mean and biased variance over all axes but the channel's
    (``training=True``), or the running statistics (``training=False``). All arguments up to
    ``eps`` are those of :func:`torch.nn.functional.batch_norm`.

    Args:
        input: shape ``(N, C, *)``, or any rank of 2 and more with ``channel_dim``; float64,
            float32, bfloat16 or float16; any strides. The output keeps shape, dtype and layout.
        running_mean, running_var: shape ``(C,)`` or None. In training they move in place:
            ``running = (1 - momentum) * running + momentum * batch``, where the variance is the
            unbiased one, ``m2 / (n - 1)``.
        weight, bias: :math:`\gamma, \beta`, shape ``(C,)`` or None, each alone if need be.
        training: normalize by the batch (True) or by the running statistics (False).
        momentum: the weight of the new batch; None for the cumulative average
            ``1 / num_batches_tracked``.
        eps: :math:`\epsilon > 0`; 0 is allowed in eval.
        residual: :math:`r`, the shape of ``input``, added before the activation.
        mask: boolean, rank of ``input``, size 1 on the channel axis and broadcastable over the
            others; False elements stay out of the statistics and come out as 0.
        activation: :math:`\phi`: 'relu', 'relu6', 'leaky_relu' or 'leaky_relu(0.2)', 'hardswish',
            'silu', 'gelu', 'sigmoid', 'tanh', or None.
        channel_dim: the axis that is kept, -1 for channel-last data.
        num_batches_tracked: int64 scalar, incremented in training if given.
        nonfinite: what a training batch with inf or NaN does to the running statistics:
            'propagate' (as torch.nn), 'skip' (they stay, ``nonfinite_batches`` counts it) or
            'raise' (:class:`~normwise.errors.NonFiniteError`, they stay).
        nonfinite_batches: int64 scalar, incremented for each such batch if given.

    Raises:
        InputError: shape, rank, size or option (a ValueError and a RuntimeError, as in torch.nn).
        DtypeError: an integer input, a mask that is not boolean.

    Statistics are taken in float64 on CPU and CUDA. First derivatives run on the kernels; higher
    derivatives, forward mode and ``torch.func`` go through plain differentiable operations.
    """
    axis = check_batch_norm(
        input, running_mean, running_var, weight, bias, residual, mask, channel_dim, training, eps
    )
    act = "none" if activation is None else activation
    if act not in ACTIVATIONS:
        parse(act)
    if not training:
        assert running_mean is not None
        assert running_var is not None
        return _normalize(
            input, running_mean, running_var, weight, bias, residual, mask, axis, eps, act
        )
    if mask is None:
        check_enough_values(input, axis)
        if num_batches_tracked is not None and input.numel() == 0:
            num_batches_tracked.add_(1)  # as torch.nn counts an empty batch; nothing else moves
    check_policy(nonfinite, momentum, running_mean, num_batches_tracked)
    compiling = torch.compiler.is_compiling()
    if not compiling and transformed():
        y, moments = reference.train_forward(input, weight, bias, residual, mask, axis, eps, act)
        if running_mean is not None and running_var is not None:
            reference.update_running(
                running_mean, running_var, num_batches_tracked, nonfinite_batches,
                moments.detach(), momentum, nonfinite,
            )  # fmt: skip
        return y
    arguments = (
        input, weight, bias, residual, mask, running_mean, running_var, num_batches_tracked,
        nonfinite_batches, axis, eps, act, momentum, nonfinite,
    )  # fmt: skip
    if not torch.is_grad_enabled():
        return _train_step(*arguments)[0]
    apply: Any = _apply_training
    if compiling:
        apply = _TrainingNorm.apply
    elif observer.LISTENERS:
        apply = _apply_observed_training
    trained: Tensor = apply(*arguments)
    return trained


def _normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    axis: int,
    eps: float,
    activation: str,
) -> Tensor:
    """y by given statistics, differentiable in everything but the statistics; in these too where
    they ask for a gradient."""
    common = (x, mean, var, weight, bias, residual, mask, axis, eps, activation)
    compiling = torch.compiler.is_compiling()
    if not compiling and transformed():
        return reference.normalize(*common)
    if torch.is_grad_enabled() and (mean.requires_grad or var.requires_grad):
        return reference.normalize(*common)
    if not torch.is_grad_enabled() or not (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        y: Tensor = ops.normalize(*common)
        return y
    apply: Any = _apply_constant
    if compiling:
        apply = _ConstantNorm.apply
    elif observer.LISTENERS:
        apply = _apply_observed_constant
    normalized: Tensor = apply(x, weight, bias, residual, mask, mean, var, axis, eps, activation)
    return normalized


def batch_norm_update(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    channel_dim: int = 1,
    nonfinite: str = "propagate",
) -> tuple[Tensor, Tensor, Tensor]:
    """Training batch norm without side effects: ``(y, new_running_mean, new_running_var)``.

    The pure form for ``torch.func``: under ``vmap`` each member of an ensemble gets its own new
    running statistics. Arguments and errors as in :func:`batch_norm`.
    """
    axis = check_batch_norm(
        input, running_mean, running_var, weight, bias, residual, mask, channel_dim, True, eps
    )
    if mask is None:
        check_enough_values(input, axis)
    check_policy(nonfinite, momentum, running_mean, None)
    act = "none" if activation is None else activation
    parse(act)
    y, moments = reference.train_forward(input, weight, bias, residual, mask, axis, eps, act)
    if nonfinite == "raise":
        reference.raise_if_nonfinite(moments)
    new_mean, new_var, _, _ = reference.updated_running(
        running_mean, running_var, None, moments.detach(), momentum, nonfinite
    )
    return y, new_mean, new_var


def batch_moments(x: Tensor, channel_dim: int = 1, mask: Tensor | None = None) -> Moments:
    """Moments of ``x`` for each channel, over all other axes.

    Args:
        x: floating tensor of rank 2 or more.
        channel_dim: the axis that is kept.
        mask: boolean, size 1 on the channel axis, broadcastable over the others.

    Returns:
        Moments with ``mean`` and ``m2`` of shape ``(C,)`` and one ``count`` for all channels.

    Example:
        >>> import torch, normwise as nw
        >>> m = nw.functional.batch_moments(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
        >>> int(m.count), m.mean.tolist(), m.variance().tolist()
        (2, [2.0, 10.0], [1.0, 0.0])
    """
    axis = check_batch_norm(x, None, None, None, None, None, mask, channel_dim, True, 1.0)
    packed = (
        reference.moments(x, mask, axis)
        if transformed() or (torch.is_grad_enabled() and x.requires_grad)
        else ops.moments(x, mask, axis)
    )
    if mask is None:
        count = torch.full((), x.numel() // max(x.shape[axis], 1), device=x.device)
    else:
        count = mask.expand(*(1 if d == axis else n for d, n in enumerate(x.shape))).sum()
    return Moments(count, packed[1], packed[2])
