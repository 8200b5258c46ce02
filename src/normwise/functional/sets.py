"""The one engine of layer, group, instance and RMS norm: sets of values, each by its own moments.

Every norm here is a view ``(N, G, P, L)`` of its input: ``N * G`` sets of ``P * L`` values, and
``G * P`` weights, of which each serves a run of ``L`` values in each of ``N`` samples.

==============  =================  ====================  ==================================
norm            input              view                  so that
==============  =================  ====================  ==================================
layer, RMS      ``(*, D)``         ``(rows, 1, D, 1)``   a row is a set, a weight a column
group           ``(N, C, *)``      ``(N, G, C / G, L)``  a set is a group of channels
instance        ``(N, C, *)``      ``(N, C, 1, L)``      a set is one channel of one sample
==============  =================  ====================  ==================================

The operators are those of batch norm, on views in which a set is a channel. `plain` says the same
in differentiable operations: higher derivatives, forward mode, ``torch.func`` and masks take it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise import ops
from normwise.activations import parse
from normwise.functional import borrowed
from normwise.functional.autograd import transformed
from normwise.moments import Moments, accumulation_dtype

__all__ = ["normalize_sets"]

# Runs of a weight at least so long are normalized with one (mean, rstd, weight) a run. Such a
# vector is 32 bytes of float64 a run: for shorter ones the sets are standardized first, and the
# weights, which then are the columns of a matrix, follow in a second pass.
_LONG_RUN = 16

_HALF = (torch.bfloat16, torch.float16)

View = tuple[int, int, int, int]


def plain(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """(y, packed moments), differentiable to any order and under ``torch.func``."""
    n, g, p, _ = x.shape
    v = x.to(accumulation_dtype(x))
    if mask is not None:
        # Padding may hold anything, and a gradient of 0 times NaN would be NaN.
        v = torch.where(mask, v, v.new_zeros(()))
    m = Moments.of(v, (2, 3), mask=None if mask is None else mask.expand(x.shape))
    count = m.count.to(v.dtype).expand(n, g)
    size = count.clamp(min=1)
    if centred:
        mean, m2 = m.mean, m.m2
        z = v - mean[..., None, None]
    else:
        mean, m2 = torch.zeros_like(m.mean), (v * v).sum((2, 3))
        z = v
    z = z * (m2 / size + eps).rsqrt()[..., None, None]
    if weight is not None:
        z = z * weight.to(v.dtype).reshape(g, p, 1)
    if bias is not None:
        z = z + bias.to(v.dtype).reshape(g, p, 1)
    if residual is not None:
        z = z + residual.to(v.dtype)
    y = parse(activation).value(z).to(x.dtype)
    if mask is not None:
        y = torch.where(mask, y, y.new_zeros(()))
    return y, torch.stack([count, mean, m2]).reshape(3, n * g)


def _mean_var(moments: Tensor) -> tuple[Tensor, Tensor]:
    return moments[1], moments[2] / moments[0].clamp(min=1)


def _moments(sets: Tensor, centred: bool) -> Tensor:
    """Packed moments of each row; about 0 for the root mean square, whose mean is 0 by decree."""
    packed: Tensor = ops.moments(sets, None, 0)
    if centred:
        return packed
    count, mean, m2 = packed.unbind(0)
    return torch.stack([count, torch.zeros_like(mean), m2 + count * mean.square()])


def _standardize(
    sets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """(y, moments) of rows, ``weight`` and ``bias`` one value a row."""
    if centred:
        y, moments = ops.train_forward(sets, weight, bias, residual, None, 0, eps, activation)
        return y, moments
    moments = _moments(sets, False)
    y = ops.normalize(sets, *_mean_var(moments), weight, bias, residual, None, 0, eps, activation)
    return y, moments


def _standardize_backward(
    dy: Tensor,
    sets: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    residual_gradient: bool,
    centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias) of `_standardize`, the last two float64 and one a row."""
    end = (0, eps, activation)
    if centred:
        return ops.train_backward(  # type: ignore[no-any-return] # custom operators are untyped
            dy, sets, moments, weight, bias, residual, None, None, *end, residual_gradient
        )
    mean, var = _mean_var(moments)
    common = (dy, sets, mean, var, weight, bias, residual, None, None)
    sums = ops.backward_reduce(*common, *end)
    # The mean does not follow x, so only the second sum comes back to it.
    pulled = torch.stack([torch.zeros_like(sums[0]), sums[1]])
    dx, dresidual = ops.backward_input(*common, pulled, None, *end, residual_gradient)
    return dx, dresidual, sums[1] * (var + eps).rsqrt(), sums[0]


class _Columns:
    """The operands of the second pass over standardized values: weights along axis 1."""

    def __init__(self, x: Tensor) -> None:
        n, g, p, length = x.shape
        self.shape = (n, g * p, length)
        dtype = accumulation_dtype(x)
        self.mean = torch.zeros(g * p, dtype=dtype, device=x.device)
        self.var = torch.ones(g * p, dtype=dtype, device=x.device)

    def __call__(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else _wide(t).reshape(self.shape)


def _wide(t: Tensor) -> Tensor:
    """What lies between two passes is float32 at least: a half type would round it twice."""
    return t.float() if t.dtype in _HALF else t


def _each(v: Tensor | None, times: int) -> Tensor | None:
    """The weights of every sample."""
    return None if v is None else v.repeat(times)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """(y, packed moments) by the operators."""
    n, g, p, length = x.shape
    sets = x.reshape(n * g, p * length)
    if p == 1 or (weight is None and bias is None):
        along = None if residual is None else residual.reshape(sets.shape)
        y, moments = _standardize(
            sets, _each(weight, n), _each(bias, n), along, eps, activation, centred
        )
    elif length >= _LONG_RUN:
        moments = _moments(sets, centred)
        mean, var = (v.repeat_interleave(p) for v in _mean_var(moments))
        runs = x.reshape(n * g * p, length)
        along = None if residual is None else residual.reshape(runs.shape)
        y = ops.normalize(
            runs, mean, var, _each(weight, n), _each(bias, n), along, None, 0, eps, activation
        )
    else:
        columns = _Columns(x)
        hat, moments = _standardize(_wide(sets), None, None, None, eps, "none", centred)
        y = ops.normalize(
            columns(hat), columns.mean, columns.var, weight, bias, columns(residual), None, 1, 0.0,
            activation,
        )  # fmt: skip
    return y.reshape(x.shape).to(x.dtype), moments


def _backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    residual_gradient: bool,
    centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias) by the operators; `_forward`'s three ways."""
    n, g, p, length = x.shape
    shape = (n * g, p * length)
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    if p > 1 and (weight is not None or bias is not None) and length < _LONG_RUN:
        columns = _Columns(x)
        wide = _wide(x).reshape(shape)
        mean, var = _mean_var(moments)
        hat = ops.normalize(wide, mean, var, None, None, None, None, 0, eps, "none")
        dhat, dresidual, dweight, dbias = ops.eval_backward(
            columns(dy), columns(hat), columns.mean, columns.var, weight, bias, columns(residual),
            None, None, 1, 0.0, activation, residual_gradient,
        )  # fmt: skip
        dx, _, _, _ = _standardize_backward(
            dhat.reshape(shape), wide, moments, None, None, None, eps, "none", False, centred
        )
        return dx, dresidual, dweight, dbias

    # One (mean, rstd, weight) a run. float64, so that the sums over samples round once.
    dtype = accumulation_dtype(x)
    each_weight = None if weight is None else _each(weight.to(dtype), n)
    each_bias = None if bias is None else _each(bias.to(dtype), n)
    if p == 1 or (weight is None and bias is None):
        along = None if residual is None else residual.reshape(shape)
        dx, dresidual, dweight, dbias = _standardize_backward(
            dy.reshape(shape), x.reshape(shape), moments, each_weight, each_bias, along, eps,
            activation, residual_gradient, centred,
        )  # fmt: skip
    else:
        runs = (n * g * p, length)
        mean, var = (v.repeat_interleave(p) for v in _mean_var(moments))
        # dx is written in two passes: in float32 at least between them.
        wide = _wide(x)
        along = None if residual is None else _wide(residual).reshape(runs)
        common = (
            _wide(dy).reshape(runs), wide.reshape(runs), mean, var, each_weight, each_bias, along,
            None, None,
        )  # fmt: skip
        end = (0, eps, activation)
        sums = ops.backward_reduce(*common, *end)
        scaled, dresidual = ops.backward_input(*common, None, None, *end, residual_gradient)
        rstd = (var + eps).rsqrt()
        dweight, dbias = sums[1] * rstd, sums[0]
        # With s = sums of weight * dz and of weight * dz * (x - mean) over a set of n values,
        # dx = weight * rstd * dz - rstd * s[0] / n - (x - mean) * rstd^3 * s[1] / n.
        pulled = sums if each_weight is None else sums * each_weight
        pulled = pulled.reshape(2, n * g, p).sum(2) / max(p * length, 1)
        own = rstd.reshape(n * g, p)[:, 0]
        dx = ops.normalize(
            wide.reshape(shape), moments[1], torch.ones_like(own), -pulled[1] * own**3,
            -pulled[0] * own if centred else None, scaled.reshape(shape), None, 0, 0.0, "none",
        )  # fmt: skip
    if dweight is not None and weight is not None:
        dweight = dweight.reshape(n, g * p).sum(0).to(weight.dtype)
    if dbias is not None and bias is not None:
        dbias = dbias.reshape(n, g * p).sum(0).to(bias.dtype)
    return dx, dresidual, dweight, dbias


def _viewed(t: Tensor | None, view: tuple[int, ...]) -> Tensor | None:
    return None if t is None else t.reshape(view)


class _SetNorm(torch.autograd.Function):
    """y, and the packed moments where they are asked for; no gradient flows through these.

    Views are taken inside: outside each would be a node of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        view: View,
        eps: float,
        activation: str,
        centred: bool,
        moments_too: bool,
    ) -> Any:
        y, *statistics = _choose(
            x.reshape(view).contiguous(), weight, bias, _viewed(residual, view), eps, activation,
            centred,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, residual, *statistics)
        ctx.options = (view, eps, activation, centred)
        y = y.reshape(x.shape)
        if not moments_too:
            return y
        ctx.mark_non_differentiable(statistics[0])
        return y, statistics[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, *statistics = ctx.saved_tensors
        view, *rest = ctx.options
        wanted = ctx.needs_input_grad[:4]
        dx: Tensor | None
        dresidual: Tensor | None = None
        if torch.is_grad_enabled():
            inputs = (x, weight, bias, residual)
            gradients = _differentiable_backward(dy, inputs, wanted, *ctx.options)
            return (*gradients, None, None, None, None, None)
        dy, values = dy.reshape(view), x.reshape(view).contiguous()
        if len(statistics) == 2:
            dx, dweight, dbias = borrowed.backward(
                dy, values, statistics[0], statistics[1], weight, bias, wanted[:3]
            )
        else:
            eps, activation, centred = rest
            dx, dresidual, dweight, dbias = _backward(
                dy, values, statistics[0], weight, bias, _viewed(residual, view), eps, activation,
                wanted[3], centred,
            )  # fmt: skip
        return (
            dx.reshape(x.shape).to(x.dtype) if wanted[0] and dx is not None else None,
            dweight if wanted[1] else None,
            dbias if wanted[2] else None,
            dresidual.reshape(x.shape).to(residual.dtype)
            if wanted[3] and dresidual is not None
            else None,
            None, None, None, None, None,
        )  # fmt: skip


# As for batch norm: Function.apply itself is 4 us of Python, which only compilers must see.
_apply = super(torch.autograd.Function, _SetNorm).apply


def _choose(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    centred: bool,
) -> tuple[Tensor, ...]:
    """(y, packed moments) by the operators, or (y, mean, rstd) by torch's own kernels."""
    if (
        centred
        and activation == "none"
        and residual is None
        and x.shape[2] > 1
        and (weight is not None or bias is not None)
        and not torch.compiler.is_compiling()
    ):
        found = borrowed.forward(x, weight, bias, eps)
        if found is not None:
            return (found[0].view(x.shape), *found[1:])
    return _forward(x, weight, bias, residual, eps, activation, centred)


def _differentiable_backward(
    dy: Tensor,
    inputs: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    view: View,
    eps: float,
    activation: str,
    centred: bool,
) -> list[Tensor | None]:
    """create_graph=True: the gradient of `plain`, which has derivatives of its own."""
    # Fresh nodes: where one input was made from another, each gradient is that of its own place.
    fresh = [None if t is None else t.view_as(t) for t in inputs]
    x, weight, bias, residual = fresh
    assert x is not None
    y, _ = plain(
        x.reshape(view), weight, bias, _viewed(residual, view), None, eps, activation, centred
    )
    asked = [t for t, want in zip(fresh, wanted, strict=True) if want and t is not None]
    found = iter(torch.autograd.grad(y, asked, dy.reshape(view), create_graph=True))
    return [next(found) if want else None for want in wanted]


def normalize_sets(
    x: Tensor,
    view: View,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    centred: bool = True,
    moments_too: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, packed moments): each set of ``x`` by its own mean and biased variance.

    Args:
        x: values, ``residual`` of the same shape; y is of this shape and contiguous.
        view: (N, G, P, L), see above.
        mask: boolean, broadcasts against the view.
        weight, bias: ``G * P`` values in any shape.
        centred: False divides by the root mean square and subtracts nothing.
        moments_too: ask for the moments, rows count, mean and m2 of ``N * G`` columns, which carry
            no gradient. Only where P is 1: a weight serves its whole set.
    """
    compiling = torch.compiler.is_compiling()
    if mask is not None or (not compiling and transformed()):
        y, moments = plain(
            x.reshape(view), weight, bias, _viewed(residual, view), mask, eps, activation, centred
        )
        return y.reshape(x.shape), moments.detach()
    weight = weight if weight is None or weight.dim() == 1 else weight.reshape(-1)
    bias = bias if bias is None or bias.dim() == 1 else bias.reshape(-1)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        apply: Any = _SetNorm.apply if compiling else _apply
        result = apply(x, weight, bias, residual, view, eps, activation, centred, moments_too)
        if moments_too:
            y, moments = result
            return y, moments
        return result, None
    y, moments, *_ = _choose(
        x.reshape(view).contiguous(), weight, bias, _viewed(residual, view), eps, activation,
        centred,
    )  # fmt: skip
    return y.reshape(x.shape), moments
