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

`direct` is an eager call on plain tensors as the kernels have it whole; `normalize_sets` serves
every other. Higher derivatives, forward mode, ``torch.func`` and masks take the reference, which is
written in differentiable operations.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from normwise import ops
from normwise.activations import ACTIVATIONS
from normwise.functional.autograd import to_keep, transformed
from normwise.ops import reference

__all__ = ["direct", "normalize_sets"]

View = tuple[int, int, int, int]
# What the view follows from: normalized_shape, or how many groups the channels of axis 1 make.
Spec = tuple[int, ...] | int


def _view(x: Tensor, spec: Spec) -> View:
    if isinstance(spec, int):
        n, channels, *rest = x.shape
        return n, spec, channels // spec, prod(rest)
    features = prod(spec)
    return x.numel() // features, 1, features, 1


def _differentiable_backward(
    dy: Tensor,
    inputs: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    view: View,
    eps: float,
    activation: str,
    centred: bool,
) -> list[Tensor | None]:
    """create_graph=True: the gradient of the reference, which has derivatives of its own."""
    # Fresh nodes: where one input was made from another, each gradient is that of its own place.
    fresh = [None if t is None else t.view_as(t) for t in inputs]
    x, weight, bias, residual = fresh
    assert x is not None
    y, _ = reference.sets_forward(x, weight, bias, residual, view, eps, activation, centred)
    asked = [t for t, want in zip(fresh, wanted, strict=True) if want and t is not None]
    found = iter(torch.autograd.grad(y, asked, dy, create_graph=True))
    return [next(found) if want else None for want in wanted]


def _gradients(
    dy: Tensor,
    saved: tuple[Tensor | None, ...],
    moments: Tensor | None,
    wanted: tuple[bool, ...],
    options: tuple[View, float, str, bool],
) -> list[Tensor | None]:
    """Those of x, weight, bias and residual, by the operators."""
    x, weight, bias, residual, output = saved
    assert x is not None
    plain = options[2] == "none"  # then dy is the residual's gradient
    dx, dresidual, dweight, dbias = ops.sets_backward(
        dy, x, moments, weight, bias, residual, output, *options, wanted[3] and not plain
    )
    found = (dx, dweight, dbias, dy if plain else dresidual)
    return [t if want else None for t, want in zip(found, wanted, strict=True)]


class _SetNorm(torch.autograd.Function):
    """y, and the packed moments where they are asked for; no gradient flows through these."""

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
        options = (view, eps, activation, centred)
        y, moments = ops.sets_forward(x, weight, bias, residual, *options)
        # create_graph=True needs the residual itself.
        ctx.save_for_backward(
            x, weight, bias, moments, residual, to_keep(activation, residual, y)[1]
        )
        ctx.options = options
        if not moments_too:
            return y
        ctx.mark_non_differentiable(moments)
        return y, moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments, residual, output = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            inputs = (x, weight, bias, residual)
            gradients = _differentiable_backward(dy, inputs, wanted, *ctx.options)
        else:
            saved = (x, weight, bias, residual, output)
            gradients = _gradients(dy, saved, moments, wanted, ctx.options)
        if residual is not None and gradients[3] is not None:
            gradients[3] = gradients[3].to(residual.dtype)
        return (*gradients, None, None, None, None, None)


class _NotDirect(Exception):
    """The kernels do not serve the call whole."""


class _DirectNorm(torch.autograd.Function):
    """y of a call that the kernels serve whole. Of a small tensor the moments are not kept: to take
    them again in backward costs less than a tensor does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        spec: Spec,
        eps: float,
        activation: str,
        code: int,
        slope: float,
        centred: bool,
    ) -> Tensor:
        found: Any = ops.direct_forward(
            x, weight, bias, residual, spec, eps, code, slope, centred, True
        )
        if found is None:
            raise _NotDirect
        y, moments = found if type(found) is tuple else (found, None)
        wanted = False
        if moments is None and residual is None:  # fewer names to save and unpack
            ctx.save_for_backward(x, weight, bias)
        else:
            output = to_keep(activation, residual, y)[1]
            ctx.save_for_backward(x, weight, bias, moments, residual, output)
            wanted = ctx.needs_input_grad[3]
        ctx.options = (spec, eps, code, slope, centred, wanted, 10, activation)
        return y  # type: ignore[no-any-return] # the binding is untyped

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        direct: tuple[Tensor | None, ...] | None = ops.direct_backward(dy, saved, ctx.options)
        if direct is not None:
            return direct
        spec, eps, _, _, centred, _, _, activation = ctx.options
        wanted = ctx.needs_input_grad[:4]
        x, weight, bias, moments, residual, output = (*saved, None, None, None)[:6]
        options = (_view(x, spec), eps, activation, centred)
        if torch.is_grad_enabled():
            inputs = (x, weight, bias, residual)
            gradients = _differentiable_backward(dy, inputs, wanted, *options)
        else:
            saved = (x, weight, bias, residual, output)
            gradients = _gradients(dy, saved, moments, wanted, options)
        return (*gradients, None, None, None, None, None, None)


# As for batch norm: Function.apply itself is 4 us of Python, which only compilers must see.
_apply = super(torch.autograd.Function, _SetNorm).apply
_apply_direct = super(torch.autograd.Function, _DirectNorm).apply


def _recorded(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> bool:
    """Whether autograd takes note of a call."""
    return torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def direct(
    x: Tensor,
    spec: Spec,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    centred: bool = True,
) -> Tensor | None:
    """y of an eager call on plain contiguous CPU tensors that fit, checked and computed at once;
    None for any other call, a wrong one too: `normalize_sets` serves it, after the checks."""
    if torch.compiler.is_compiling() or transformed():
        return None
    act = ACTIVATIONS.get("none" if activation is None else activation)
    if act is None:
        return None
    y: Tensor | None
    if not _recorded(x, weight, bias, residual):
        y = ops.direct_forward(
            x, weight, bias, residual, spec, eps, act.code, act.slope, centred, False
        )
        return y
    apply: Any = _apply_direct
    try:
        y = apply(x, weight, bias, residual, spec, eps, act.name, act.code, act.slope, centred)
    except _NotDirect:
        return None
    return y


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
            no gradient.
    """
    options = (view, eps, activation, centred)
    compiling = torch.compiler.is_compiling()
    if mask is not None or (not compiling and transformed()):
        y, moments = reference.sets_forward(x, weight, bias, residual, *options, mask)
        return y, moments.detach()
    if not _recorded(x, weight, bias, residual):
        y, moments = ops.sets_forward(x, weight, bias, residual, *options)
        return y, moments
    apply: Any = _SetNorm.apply if compiling else _apply
    result = apply(x, weight, bias, residual, *options, moments_too)
    return result if moments_too else (result, None)
