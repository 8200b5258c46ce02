"""The executable specification: every operator in plain PyTorch, on every device and dtype.

Statistics and the map itself are computed in ``accumulation_dtype`` and rounded once at the end.
``moments`` and ``normalize`` are differentiable to any order, in forward and reverse mode and under
``torch.func``: higher derivatives go through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.activations import parse
from normwise.errors import NonFiniteError, message
from normwise.moments import Moments, accumulation_dtype

__all__ = [
    "backward_input",
    "backward_reduce",
    "eval_backward",
    "in_layout_of",
    "mean_var",
    "moments",
    "normalize",
    "parameter_gradients",
    "sets_backward",
    "sets_forward",
    "train_backward",
    "train_forward",
    "update_running",
    "updated_running",
]


def _other_dims(x: Tensor, channel_dim: int) -> list[int]:
    return [d for d in range(x.dim()) if d != channel_dim]


def _spread(v: Tensor | None, like: Tensor, channel_dim: int) -> Tensor | None:
    """A per-channel vector, shaped to broadcast against ``like``."""
    if v is None:
        return None
    shape = [1] * like.dim()
    shape[channel_dim] = v.shape[0]
    return v.to(accumulation_dtype(like)).reshape(shape)


def moments(x: Tensor, mask: Tensor | None, channel_dim: int) -> Tensor:
    m = Moments.of(x, _other_dims(x, channel_dim), mask=mask)
    return torch.stack([m.count.to(m.mean.dtype).expand(m.mean.shape), m.mean, m.m2])


def mean_var(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of packed moments."""
    count, mean, m2 = moments.unbind(0)
    return mean, m2 / count.clamp(min=1)


def _before_activation(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    channel_dim: int,
    eps: float,
) -> Tensor:
    """z = (x - mean) * rstd * weight + bias + residual, in the accumulation dtype."""
    z = x.to(accumulation_dtype(x)) - _vector(mean, x, channel_dim)
    scale = (_vector(var, x, channel_dim) + eps).rsqrt()
    w = _spread(weight, x, channel_dim)
    z = z * (scale if w is None else scale * w)
    b = _spread(bias, x, channel_dim)
    if b is not None:
        z = z + b
    if residual is not None:
        z = z + residual.to(z.dtype)
    return z


def _vector(v: Tensor, like: Tensor, channel_dim: int) -> Tensor:
    spread = _spread(v, like, channel_dim)
    assert spread is not None
    return spread


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
) -> Tensor:
    z = _before_activation(x, mean, var, weight, bias, residual, channel_dim, eps)
    y = parse(activation).value(z).to(x.dtype)
    if mask is not None:
        y = torch.where(mask, y, y.new_zeros(()))
    return in_layout_of(x, y)


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """The layout of x, not of a residual, a mask or dy: the fake kernels promise it."""
    like = torch.empty_like(x)
    return y if like.stride() == y.stride() and like.dtype == y.dtype else like.copy_(y)


def train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    m = moments(x, mask, channel_dim)
    mean, var = mean_var(m)
    y = normalize(x, mean, var, weight, bias, residual, mask, channel_dim, eps, activation)
    return y, m


def updated_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    moments: Tensor,
    momentum: float | None,
    nonfinite: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The running statistics after this batch, nothing written in place.

    running = (1 - momentum) * running + momentum * batch; the variance that enters is the unbiased
    one. ``momentum`` None is the cumulative average, 1 / num_batches_tracked. Returns the new mean,
    the new variance, the new number of batches and whether the batch was rejected as not finite.
    A batch with no element leaves everything as it was.
    """
    count, mean, m2 = moments.unbind(0)
    var = m2 / (count - 1).clamp(min=1)
    finite = torch.isfinite(mean).all() & torch.isfinite(m2).all()
    some = (count > 0).all()
    take = (some & finite) if nonfinite == "skip" else some
    tracked = num_batches_tracked
    if tracked is not None:
        tracked = tracked + take.to(tracked.dtype)
    if momentum is None:
        assert tracked is not None
        factor = tracked.clamp(min=1).to(mean.dtype).reciprocal()
    else:
        factor = torch.full((), momentum, dtype=mean.dtype, device=mean.device)

    def blend(running: Tensor, batch: Tensor) -> Tensor:
        new = (1 - factor) * running.to(batch.dtype) + factor * batch
        return torch.where(take, new.to(running.dtype), running)

    return blend(running_mean, mean), blend(running_var, var), tracked, some & ~finite


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    nonfinite_batches: Tensor | None,
    moments: Tensor,
    momentum: float | None,
    nonfinite: str,
) -> None:
    if nonfinite == "raise":
        raise_if_nonfinite(moments)
    new_mean, new_var, tracked, rejected = updated_running(
        running_mean, running_var, num_batches_tracked, moments, momentum, nonfinite
    )
    running_mean.copy_(new_mean)
    running_var.copy_(new_var)
    if num_batches_tracked is not None and tracked is not None:
        num_batches_tracked.copy_(tracked)
    if nonfinite_batches is not None:
        nonfinite_batches.add_(rejected.to(nonfinite_batches.dtype))


def raise_if_nonfinite(moments: Tensor) -> None:
    """Name the channels of a batch whose mean or variance is inf or NaN (waits for the device)."""
    bad = ~(torch.isfinite(moments[1]) & torch.isfinite(moments[2]))
    if not bool(bad.any()):
        return
    channels = bad.nonzero().flatten().tolist()
    shown = ", ".join(map(str, channels[:8])) + (", …" if len(channels) > 8 else "")
    raise NonFiniteError(
        message(
            "the batch statistics are finite (nonfinite='raise')",
            f"inf or NaN in {len(channels)} of {bad.numel()} channels: {shown}",
            "find the input that is not finite; the running statistics were not touched. "
            "nonfinite='skip' goes on without such a batch",
        )
    )


def _gradient_before_activation(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
) -> Tensor:
    """dz = dy * activation'(z); z is rebuilt from x, or replaced by the output where its sign (or
    range) is that of z."""
    dz = dy.to(accumulation_dtype(x))
    act = parse(activation)
    if act.name != "none":
        if output is not None and act.from_output:
            z = output.to(dz.dtype)
        else:
            z = _before_activation(x, mean, var, weight, bias, residual, channel_dim, eps)
        dz = dz * act.derivative(z)
    return dz if mask is None else torch.where(mask, dz, dz.new_zeros(()))


def backward_reduce(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
) -> Tensor:
    dz = _gradient_before_activation(
        dy, x, mean, var, weight, bias, residual, output, mask, channel_dim, eps, activation
    )
    centred = x.to(dz.dtype) - _vector(mean, x, channel_dim)
    product = dz * centred
    if mask is not None:
        product = torch.where(mask, product, product.new_zeros(()))
    dims = _other_dims(x, channel_dim)
    if not dims:
        return torch.stack([dz, product])
    return torch.stack([dz.sum(dims), product.sum(dims)])


def backward_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    sums: Tensor | None,
    count: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
    residual_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    dz = _gradient_before_activation(
        dy, x, mean, var, weight, bias, residual, output, mask, channel_dim, eps, activation
    )
    rstd = (_vector(var, x, channel_dim) + eps).rsqrt()
    w = _spread(weight, x, channel_dim)
    dx = dz
    if sums is not None:
        if count is None:
            n: Tensor | int = max(x.numel() // max(x.shape[channel_dim], 1), 1)
        else:
            n = count.to(dz.dtype).clamp(min=1)
            n = n if n.dim() == 0 else _vector(n, x, channel_dim)
        centred = x.to(dz.dtype) - _vector(mean, x, channel_dim)
        dx = dz - _vector(sums[0], x, channel_dim) / n
        dx = dx - centred * rstd * rstd * (_vector(sums[1], x, channel_dim) / n)
    dx = dx * (rstd if w is None else rstd * w)
    if mask is not None:
        dx = torch.where(mask, dx, dx.new_zeros(()))
    dx = in_layout_of(x, dx)
    return dx, in_layout_of(x, dz) if residual_gradient else None


def train_backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
    residual_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    mean, var = mean_var(moments)
    common = (x, mean, var, weight, bias, residual, output, mask)
    sums = backward_reduce(dy, *common, channel_dim, eps, activation)
    dx, dresidual = backward_input(
        dy, *common, sums, moments[0], channel_dim, eps, activation, residual_gradient
    )
    dweight, dbias = parameter_gradients(sums, var, weight, bias, eps)
    return dx, dresidual, dweight, dbias


def eval_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
    residual_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    common = (dy, x, mean, var, weight, bias, residual, output, mask)
    sums = backward_reduce(*common, channel_dim, eps, activation)
    dx, dresidual = backward_input(
        *common, None, None, channel_dim, eps, activation, residual_gradient
    )
    dweight, dbias = parameter_gradients(sums, var.to(sums.dtype), weight, bias, eps)
    return dx, dresidual, dweight, dbias


def parameter_gradients(
    sums: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor | None]:
    """dweight = sum(dz * (x - mean)) * rstd and dbias = sum(dz), each in its parameter's dtype."""
    dweight = None if weight is None else (sums[1] * (var + eps).rsqrt()).to(weight.dtype)
    dbias = None if bias is None else sums[0].to(bias.dtype, copy=True)
    return dweight, dbias


def sets_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    view: tuple[int, int, int, int],
    eps: float,
    activation: str,
    centred: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable to any order and under ``torch.func``; ``mask`` broadcasts to the view."""
    n, g, p, _ = view
    v = x.reshape(view).to(accumulation_dtype(x))
    if mask is not None:
        # Padding may hold anything, and a gradient of 0 times NaN would be NaN.
        v = torch.where(mask, v, v.new_zeros(()))
    m = Moments.of(v, (2, 3), mask=None if mask is None else mask.expand(v.shape))
    count = m.count.to(v.dtype).expand(n, g)
    mean, m2 = (m.mean, m.m2) if centred else (torch.zeros_like(m.mean), (v * v).sum((2, 3)))
    z = v - mean[..., None, None] if centred else v
    z = z * (m2 / count.clamp(min=1) + eps).rsqrt()[..., None, None]
    if weight is not None:
        z = z * weight.to(v.dtype).reshape(g, p, 1)
    if bias is not None:
        z = z + bias.to(v.dtype).reshape(g, p, 1)
    if residual is not None:
        z = z + residual.to(v.dtype).reshape(view)
    y = parse(activation).value(z).to(x.dtype)
    if mask is not None:
        y = torch.where(mask, y, y.new_zeros(()))
    return y.reshape(x.shape).contiguous(), torch.stack([count, mean, m2]).reshape(3, n * g)


def sets_backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    view: tuple[int, int, int, int],
    eps: float,
    activation: str,
    centred: bool,
    residual_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    n, g, p, length = view
    if moments is None:
        _, moments = sets_forward(x, None, None, None, view, eps, "none", centred)
    mean, var = (t.reshape(n, g, 1, 1) for t in mean_var(moments))
    rstd = (var + eps).rsqrt()
    dtype = accumulation_dtype(x)
    xhat = (x.reshape(view).to(dtype) - mean) * rstd
    w = None if weight is None else weight.to(dtype).reshape(g, p, 1)
    dz = dy.reshape(view).to(dtype)
    act = parse(activation)
    if act.name != "none":
        if output is not None and act.from_output:
            z = output.reshape(view).to(dtype)
        else:
            z = xhat if w is None else xhat * w
            if bias is not None:
                z = z + bias.to(dtype).reshape(g, p, 1)
            if residual is not None:
                z = z + residual.reshape(view).to(dtype)
        dz = dz * act.derivative(z)
    dxhat = dz if w is None else dz * w
    size = max(p * length, 1)
    dx = dxhat - xhat * ((dxhat * xhat).sum((2, 3), keepdim=True) / size)
    if centred:
        dx = dx - dxhat.sum((2, 3), keepdim=True) / size
    return (
        (dx * rstd).to(x.dtype).reshape(x.shape).contiguous(),
        dz.to(x.dtype, copy=True).reshape(x.shape).contiguous() if residual_gradient else None,
        None if weight is None else (dz * xhat).sum((0, 3)).to(weight.dtype).reshape(weight.shape),
        None if bias is None else dz.sum((0, 3)).to(bias.dtype).reshape(bias.shape),
    )
