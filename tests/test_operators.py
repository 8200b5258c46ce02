"""Every operator on every backend against the oracle: dtypes, layouts, sizes, activations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    ELEMENT,
    LAYOUTS,
    ROUNDING,
    SUM,
    Case,
    Problem,
    array,
    assert_near,
    compute_rounding,
    per_channel,
)
from conftest import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ACTIVATIONS, Array, BatchNorm, moments
from torch import Tensor

from normwise import ops
from normwise.activations import parse
from normwise.ops import cpu

# One value a channel, one channel, primes, around the width of every vector, long runs, wide rows.
SHAPES = [
    (1, 1),
    (1, 3),
    (2, 1),
    (2, 3),
    (17, 5),
    (31, 64),
    (5, 521),
    (3, 2, 1),
    (3, 2, 3),
    (3, 2, 7),
    (3, 2, 8),
    (3, 2, 15),
    (3, 2, 16),
    (3, 2, 17),
    (2, 3, 33),
    (5, 7, 1, 1),
    (2, 3, 7, 7),
    (1, 2, 13, 11),
    (2, 1, 4, 4),
    (67, 3, 2, 2),
    (2, 5, 3, 2, 5),
    (2, 3, 2, 2, 2, 2),
]
# The chunks of csrc/planar.h and rows.h: over 65536 values a channel, runs over 2 * 65536, and
# more than 512 columns.
LARGE = [
    (3, 2, 200, 150),
    (1, 1, 139_999),
    (1, 2, 139_999),
    (700, 2, 10, 13),
    (600, 600),
    (9000, 3),
]
EMPTY = [(0, 3), (2, 0, 4), (2, 3, 0), (0, 3, 4, 4), (0, 0)]


# Against the oracle


def check_moments(p: Problem, result: Tensor) -> None:
    expected = moments(array(p.x), p.case.channel_dim)
    assert result.dtype == torch.float64
    assert result.is_contiguous()
    assert_near(result[0], expected.count, 0)
    # A value's rounding when the deviations are summed, and the double rounding of the mean.
    deviation = np.sqrt(expected.var)
    unit = np.abs(expected.mean) * (2.0**-50 if p.case.dtype != torch.float64 else 2.0**-49)
    allowed = deviation * 2.0 ** (-48 if p.case.dtype == torch.float64 else -21) + unit
    assert (np.abs(array(result[1]) - expected.mean) <= allowed).all()
    relative = 2.0 ** (-44 if p.case.dtype == torch.float64 else -20)
    assert (np.abs(array(result[2]) - expected.m2) <= relative * expected.m2).all()


def check_same_layout(result: Tensor, x: Tensor) -> None:
    """The strides of ``empty_like``; that of an axis of size 1 says nothing."""
    expected = torch.empty_like(x)
    assert result.dtype == x.dtype
    assert [s for s, n in zip(result.stride(), x.shape, strict=True) if n != 1] == [
        s for s, n in zip(expected.stride(), x.shape, strict=True) if n != 1
    ]


def arguments(p: Problem) -> tuple[int, float, str]:
    return p.case.channel_dim, p.case.eps, p.case.activation


def rounded_mean(call: BatchNorm, dtype: torch.dtype) -> Array:
    """How many more roundings of y the rounding of the mean to float64 is."""
    mean, var = call.mean_var
    relative = np.abs(mean) / np.sqrt(var + call.eps)
    shape = call.normalized[1].shape
    return relative.reshape(shape) * ROUNDING[torch.float64] / compute_rounding(dtype)


def check_forward(p: Problem, y: Tensor, call: BatchNorm) -> None:
    check_same_layout(y, p.x)
    scale = per_channel(call.before_activation, p.case.channel_dim)
    gamma = np.abs(call.normalized[2])
    scale = scale + gamma * rounded_mean(call, p.case.dtype)
    assert_near(y, call.forward(), scale, computed=p.case.dtype)


def check_backward(
    p: Problem,
    call: BatchNorm,
    dx: Tensor | None = None,
    dresidual: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    dy, axis, dtype = array(p.dy), p.case.channel_dim, p.case.dtype
    expected = call.gradients(dy)
    others = tuple(d for d in range(p.x.dim()) if d != axis)
    xhat, rstd, gamma = call.normalized
    dz, rounded = expected.dresidual, rounded_mean(call, dtype)
    terms = np.abs(dz) + np.abs(dy) * rounded  # what a rounding of z changes dz by
    if dx is not None:
        check_same_layout(dx, p.x)
        largest = per_channel(terms, axis) * (1 + (per_channel(xhat, axis) + rounded) ** 2)
        assert_near(dx, expected.dx, largest * np.abs(rstd * gamma), ELEMENT, dtype)
    if dresidual is not None:
        check_same_layout(dresidual, p.x)
        scale = per_channel(terms, axis) + per_channel(dy, axis)
        assert_near(dresidual, dz, scale, ELEMENT, dtype)
    if dweight is not None:
        scale = (terms * (np.abs(xhat) + rounded)).sum(others)
        assert_near(dweight, expected.dweight, scale, SUM, dtype)
    if dbias is not None:
        assert_near(dbias, expected.dbias, terms.sum(others), SUM, dtype)


def check_sums(p: Problem, call: BatchNorm, sums: Tensor) -> None:
    dy = array(p.dy)
    others = tuple(d for d in range(p.x.dim()) if d != p.case.channel_dim)
    xhat, rstd, _ = call.normalized
    rounded = rounded_mean(call, p.case.dtype)
    terms = np.abs(call.dz(dy)) + np.abs(dy) * rounded
    scale = np.stack([terms.sum(others), (terms * (np.abs(xhat) + rounded) / rstd).sum(others)])
    assert sums.dtype == torch.float64
    assert_near(sums, call.sums(dy), scale, SUM, p.case.dtype)


def check_training(case: Case) -> None:
    """train_forward and train_backward, from the residual and from the output."""
    p = case.tensors()
    call = p.oracle()
    y, m = ops.train_forward(p.x, p.weight, p.bias, p.residual, None, *arguments(p))
    check_moments(p, m)
    check_forward(p, y, call)
    kept: list[tuple[Tensor | None, Tensor | None]] = [(p.residual, None)]
    if p.residual is not None and parse(case.activation).from_output:
        kept.append((None, y))
    for residual, output in kept:
        dx, dresidual, dweight, dbias = ops.train_backward(
            p.dy, p.x, m, p.weight, p.bias, residual, output, None, *arguments(p), True
        )
        check_backward(p, call, dx, dresidual)
        if p.weight is not None:
            assert dweight.dtype == p.weight.dtype
            check_backward(p, call, dweight=dweight)
        if p.bias is not None:
            assert dbias.dtype == p.bias.dtype
            check_backward(p, call, dbias=dbias)


def check_split_operators(case: Case) -> None:
    """The operators of eval mode and of synchronised batch norm."""
    p = case.tensors()
    m = ops.moments(p.x, None, case.channel_dim)
    check_moments(p, m)
    for training in (False, True):
        call = p.oracle(training)
        mean, var = (m[1], m[2] / m[0].clamp(min=1)) if training else (p.mean, p.var)
        constants = (mean, var, p.weight, p.bias, p.residual)
        check_forward(p, ops.normalize(p.x, *constants, None, *arguments(p)), call)
        sums = ops.backward_reduce(p.dy, p.x, *constants, None, None, *arguments(p))
        check_sums(p, call, sums)
        dx, dresidual = ops.backward_input(
            *(p.dy, p.x, *constants, None, None, sums if training else None, None),
            *(*arguments(p), True),
        )
        check_backward(p, call, dx, dresidual)
        if not training:
            dx, dresidual, dweight, dbias = ops.eval_backward(
                p.dy, p.x, *constants, None, None, *arguments(p), True
            )
            check_backward(
                p, call, dx, dresidual,
                None if p.weight is None else dweight, None if p.bias is None else dbias,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_in_every_dtype_and_size(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check_training(Case(shape, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 2], ids=str)
def test_training_in_every_layout(backend: str, shape: tuple[int, ...], layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_training(Case(shape, dtype=dtype, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_training_in_chunks(backend: str, shape: tuple[int, ...], layout: str) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for dtype in dtypes[:1] if backend == "reference" else dtypes:
        check_training(Case(shape, dtype=dtype, layout=layout, activation="relu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(17, 5), (2, 3, 33), (5, 7, 1, 1), (2, 3, 7, 7)], ids=str)
def test_split_operators(
    backend: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    check_split_operators(Case(shape, dtype=dtype, layout=layout))


@pytest.mark.parametrize("residual", [None, "contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_activation_and_residual(
    backend: str, layout: str, activation: str, residual: str | None
) -> None:
    for dtype in DTYPES:
        case = Case(
            (3, 5, 6, 7), dtype=dtype, layout=layout, activation=activation, residual=residual
        )
        check_training(case)
        check_split_operators(case)


@pytest.mark.parametrize(
    "parameters", [(), ("weight",), ("bias",), ("weight", "bias")], ids=["-", "w", "b", "wb"]
)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_parameters_on_and_off(backend: str, layout: str, parameters: tuple[str, ...]) -> None:
    for activation in ("none", "relu", "silu"):
        case = Case((4, 9, 5, 5), layout=layout, parameters=parameters, activation=activation)
        check_training(case)
        check_split_operators(case)


@pytest.mark.parametrize("own", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_another_dtype(backend: str, dtype: torch.dtype, own: torch.dtype) -> None:
    for layout in LAYOUTS[:2]:
        check_training(Case((4, 3, 33), dtype=dtype, parameter_dtype=own, layout=layout))


@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [
        ((5, 2), 0),
        ((5, 3, 4), 0),
        ((5, 3, 4), 2),
        ((2, 3, 4, 17), 3),
        ((2, 3, 4, 17), 2),
        ((7,), 0),
    ],
    ids=str,
)
def test_any_channel_axis(backend: str, shape: tuple[int, ...], channel_dim: int) -> None:
    for layout in LAYOUTS:
        case = Case(shape, channel_dim, layout, activation="relu", residual="contiguous")
        check_training(case)
        check_split_operators(case)


@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_in_another_layout(backend: str, layout: str, dy_layout: str) -> None:
    check_training(Case((3, 4, 5, 6), layout=layout, dy_layout=dy_layout, activation="gelu"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("expanded", ["x", "residual", "dy"])
def test_expanded_tensors(backend: str, layout: str, expanded: str) -> None:
    """One image, repeated over the batch with stride 0."""
    p = Case((4, 3, 5, 5), layout=layout, residual=layout, activation="silu").tensors()
    tensor = getattr(p, expanded)[:1].expand(4, 3, 5, 5)
    setattr(p, expanded, tensor)
    y, m = ops.train_forward(p.x, p.weight, p.bias, p.residual, None, *arguments(p))
    check_moments(p, m)
    check_forward(p, y, p.oracle())
    gradients = ops.train_backward(
        p.dy, p.x, m, p.weight, p.bias, p.residual, None, None, *arguments(p), True
    )
    check_backward(p, p.oracle(), *gradients)


@pytest.mark.parametrize("negated", ["x", "dy", "residual", "weight"])
def test_lazily_negated_tensors(backend: str, negated: str) -> None:
    """Complex numbers give real views whose sign is a flag, not in memory."""
    p = Case((9, 3), residual="contiguous", activation="silu").tensors()
    setattr(p, negated, getattr(p, negated)._neg_view())
    y, m = ops.train_forward(p.x, p.weight, p.bias, p.residual, None, *arguments(p))
    check_moments(p, m)
    check_forward(p, y, p.oracle())
    gradients = ops.train_backward(
        p.dy, p.x, m, p.weight, p.bias, p.residual, None, None, *arguments(p), True
    )
    check_backward(p, p.oracle(), *gradients)


def test_more_axes_than_anyone_needs(backend: str) -> None:
    check_training(Case((2,) * 18, channel_dim=5, activation="relu"))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_input(backend: str, shape: tuple[int, ...]) -> None:
    p = Case(shape, activation="relu").tensors()
    y, m = ops.train_forward(p.x, p.weight, p.bias, None, None, *arguments(p))
    assert y.shape == shape
    assert torch.equal(m, torch.zeros(3, shape[1], dtype=torch.float64))
    dx, _, dweight, dbias = ops.train_backward(
        p.dy, p.x, m, p.weight, p.bias, None, None, None, *arguments(p), False
    )
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros(shape[1]))
    assert torch.equal(dbias, torch.zeros(shape[1]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rank = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(st.integers(1, 19), min_size=rank, max_size=rank)))
    while np.prod(shape) > 20_000:
        shape = tuple(max(1, n // 2) for n in shape)
    layouts = st.sampled_from(LAYOUTS)
    return Case(
        shape,
        draw(st.integers(0, rank - 1)),
        draw(layouts),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([(), ("weight",), ("bias",), ("weight", "bias")])),
        draw(st.sampled_from([None, torch.float32])),
        draw(st.none() | layouts),
        draw(layouts),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        offset=draw(st.sampled_from([0.0, -3.0, 100.0])),
        eps=draw(st.sampled_from([1e-5, 1e-3])),
    )


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=60)
@given(case=cases())
def test_any_combination(name: str, case: Case) -> None:
    with cpu.force(None if name == "reference" else name):
        check_training(case)
        check_split_operators(case)


# Masks


# Short runs, which the reference serves; around a vector; a row longer than one; wide rows.
MASKED = [(6, 3, 11), (4, 3, 16), (5, 2, 17), (3, 9, 45), (2, 5, 7, 9), (3, 1030, 3)]


def padded(p: Problem) -> tuple[Tensor, Tensor | None, Tensor]:
    """x, residual and dy whose padding holds what must not come through."""
    bad = (torch.nan, torch.inf, -torch.inf)
    tensors = (p.x, p.residual, p.dy)
    x, residual, dy = (
        None if t is None else t.clone().masked_fill_(~p.mask, v)
        for t, v in zip(tensors, bad, strict=True)
    )
    return x, residual, dy


def check_masked(p: Problem) -> None:
    x, residual, dy = padded(p)
    axis, call = p.case.channel_dim, p.oracle()
    y, m = ops.train_forward(x, p.weight, p.bias, residual, p.mask, *arguments(p))
    expected = moments(array(p.x), axis, p.mask.numpy())
    assert torch.equal(ops.moments(x, p.mask, axis), m)
    double = p.case.dtype == torch.float64
    deviation = np.sqrt(expected.var)
    allowed = deviation * 2.0 ** (-48 if double else -21) + np.abs(expected.mean) * 2.0**-49
    assert torch.equal(m[0], torch.full_like(m[0], float(p.mask.sum())))
    assert (np.abs(array(m[1]) - expected.mean) <= allowed).all()
    error = np.abs(array(m[2]) - expected.m2)
    assert (error <= 2.0 ** (-44 if double else -20) * expected.m2).all()
    check_forward(p, y, call)
    gradients = ops.train_backward(
        dy, x, m, p.weight, p.bias, residual, None, p.mask, *arguments(p), True
    )
    check_backward(p, call, *gradients)
    call, constants = p.oracle(False), (p.mean, p.var, p.weight, p.bias, residual)
    check_forward(p, ops.normalize(x, *constants, p.mask, *arguments(p)), call)
    check_sums(p, call, ops.backward_reduce(dy, x, *constants, None, p.mask, *arguments(p)))
    gradients = ops.eval_backward(dy, x, *constants, None, p.mask, *arguments(p), True)
    check_backward(p, call, *gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", MASKED, ids=str)
def test_mask(backend: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Padding takes no part, though it holds NaN: y is 0 there, and so are the gradients."""
    for activation, residual in [("relu", None), ("silu", layout), ("none", None)]:
        case = Case(
            shape, dtype=dtype, layout=layout, mask=True, residual=residual, activation=activation
        )
        check_masked(case.tensors())


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_mask_in_chunks(backend: str, layout: str) -> None:
    check_masked(Case((2, 2, 70_001), layout=layout, mask=True, activation="relu").tensors())


def masks(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Masks of (N, C, L): padding at the end, sequences of no element, one element, all."""
    n, _, length = shape
    positions, lengths = torch.arange(length), torch.arange(n) * length // n
    one = torch.zeros(n, 1, length, dtype=torch.bool)
    one[-1, 0, 3] = one[0, 0, -1] = True
    return {
        "lengths": (positions < lengths[:, None]).unsqueeze(1),
        "holes": (positions % 40 < 7).expand(n, 1, length),
        "two": one,
        "all": torch.ones(1, 1, 1, dtype=torch.bool),
    }


@pytest.mark.parametrize("kind", ["lengths", "holes", "two", "all"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_masks_of_every_kind(backend: str, layout: str, kind: str, offset: float) -> None:
    p = Case((5, 19, 100), layout=layout, offset=offset, residual=layout).tensors()
    p.mask = masks(p.case.shape)[kind].expand(5, 1, 100)
    check_masked(p)


def test_mask_without_an_element(backend: str) -> None:
    for layout in LAYOUTS[:2]:
        p = Case((3, 5, 20), layout=layout, mask=True, activation="relu").tensors()
        p.mask.zero_()
        x, _, dy = padded(p)
        y, m = ops.train_forward(x, p.weight, p.bias, None, p.mask, *arguments(p))
        gradients = ops.train_backward(
            dy, x, m, p.weight, p.bias, None, None, p.mask, *arguments(p), True
        )
        assert all(torch.equal(t, torch.zeros_like(t)) for t in (y, m, *gradients))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [(1, 1, 139_999), (2, 3, 70_001), (40, 48, 90)], ids=str)
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_masked_bits_depend_on_no_thread_and_no_cache(
    name: str, shape: tuple[int, ...], layout: str
) -> None:
    p = Case(shape, layout=layout, mask=True, residual=layout).tensors()
    assert cpu.moments(p.x, p.mask, 1) is not NotImplemented
    end = (p.mask, 1, 1e-5, "relu")

    def everything() -> list[Tensor]:
        y, m = ops.train_forward(p.x, p.weight, p.bias, p.residual, *end)
        return [y, m, *ops.train_backward(p.dy, p.x, m, p.weight, p.bias, None, y, *end, True)]

    with cpu.force(name):
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(2)
        assert all(map(torch.equal, everything(), one))
        with cpu.assume_caches(0, 0):
            assert all(map(torch.equal, everything(), one))


# Hard numbers

AWAY = [0.0, 1e4, -1e4, 1e6]
HARD_SHAPES = [(64, 5), (4, 3, 16, 17), (2, 2, 300, 150)]


@pytest.mark.parametrize("offset", AWAY)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", HARD_SHAPES, ids=str)
def test_data_far_from_zero(
    backend: str, shape: tuple[int, ...], layout: str, offset: float
) -> None:
    """Standard deviation 1 around 1e6: as exact as data around 0."""
    case = Case(shape, layout=layout, offset=offset)
    check_training(case)
    check_split_operators(replace(case, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e18, 1e-18, 1e30, 1e-30])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", HARD_SHAPES, ids=str)
def test_large_and_small_scale(
    backend: str, shape: tuple[int, ...], layout: str, scale: float
) -> None:
    case = Case(shape, layout=layout, scale=scale, eps=1e-5 if scale > 1 else 1e-40)
    p = case.tensors()
    y, m = ops.train_forward(p.x, p.weight, p.bias, None, None, *arguments(p))
    check_moments(p, m)
    check_forward(p, y, p.oracle())
    gradients = ops.train_backward(
        p.dy, p.x, m, p.weight, p.bias, None, None, None, *arguments(p), False
    )
    check_backward(p, p.oracle(), gradients[0], None, *gradients[2:])


# The kernels subtract a guess of the mean, taken from 16 values spread evenly over the channel.
UNEVEN: dict[str, Callable[[Tensor], Tensor]] = {
    "every sixteenth of the data": lambda v: v[:, :: v.shape[1] // 16].add_(1000),
    "the first value": lambda v: v[:, 0].add_(1e6),
    "the first image": lambda v: v[:, : v.shape[1] // 4].add_(3000),
    "the last value": lambda v: v[:, -1].add_(1e6),
    "a ramp": lambda v: v.add_(torch.arange(v.shape[1])),
    "heavy tails": lambda v: v.div_(v.flip(1).abs() + 1e-3),
}


@pytest.mark.parametrize("kind", UNEVEN)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [(4096, 3), (4, 3, 32, 32), (4, 2, 256, 100)], ids=str)
def test_data_that_a_sample_misjudges(
    backend: str, shape: tuple[int, ...], layout: str, kind: str
) -> None:
    p = Case(shape, layout=layout, offset=1.0).tensors()
    values = p.x.movedim(1, 0).flatten(1).contiguous()
    UNEVEN[kind](values)
    p.x.copy_(values.view(p.x.movedim(1, 0).shape).movedim(0, 1))
    y, m = ops.train_forward(p.x, p.weight, p.bias, None, None, *arguments(p))
    check_moments(p, m)
    check_forward(p, y, p.oracle())


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e6, 1.1e18, 1e-30])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", HARD_SHAPES, ids=str)
def test_constant_channel_is_its_mean_with_variance_0(
    backend: str, shape: tuple[int, ...], layout: str, value: float
) -> None:
    p = Case(shape, layout=layout).tensors()
    p.x[:, 1] = value
    y, m = ops.train_forward(p.x, p.weight, p.bias, None, None, *arguments(p))
    assert m[1, 1] == p.x[0, 1].flatten()[0]
    assert m[2, 1] == 0
    assert (y[:, 1] == p.bias[1]).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [(9, 20), (4, 20, 6, 7), (2, 20, 60, 60)], ids=str)
def test_one_bad_channel_leaves_the_others_as_they_were(
    backend: str, shape: tuple[int, ...], layout: str, value: float
) -> None:
    p = Case(shape, layout=layout).tensors()
    rest = [c for c in range(20) if c != 7]

    def everything(x: Tensor) -> list[Tensor]:
        y, m = ops.train_forward(x, p.weight, p.bias, None, None, *arguments(p))
        dx, _, dweight, dbias = ops.train_backward(
            p.dy, x, m, p.weight, p.bias, None, None, None, *arguments(p), False
        )
        return [y[:, rest], dx[:, rest], m[:, rest], dweight[rest], dbias[rest]]

    good = everything(p.x)
    bad = p.x.clone()
    bad[1, 7] = value
    assert all(map(torch.equal, everything(bad), good))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [(9, 3), (4, 3, 6, 7)], ids=str)
def test_statistics_of_a_bad_channel_are_not_finite(
    backend: str, shape: tuple[int, ...], layout: str, value: float
) -> None:
    p = Case(shape, layout=layout).tensors()
    p.x[1, 2] = value
    m = ops.moments(p.x, None, 1)
    assert not m[1:, 2].isfinite().any()
    assert m[:, :2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_comes_through_every_activation(
    backend: str, activation: str, dtype: torch.dtype
) -> None:
    for shape in ((9, 3), (4, 3, 6, 7)):
        p = Case(shape, activation=activation, dtype=dtype).tensors()
        p.x[1, 2] = torch.nan
        y = ops.normalize(p.x, p.mean, p.var, p.weight, p.bias, None, None, *arguments(p))
        assert torch.equal(y.isnan(), p.x.isnan())


@pytest.mark.parametrize("shape", [(1, 1, 65536), (2, 32768), (13107, 5)], ids=str)
@pytest.mark.parametrize("factor", [1, 1 + 2**-8, 1 + 2**-11, 3 * 2**-11, 2**11])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_read_and_rounded_as_pytorch_does(
    backend: str, dtype: torch.dtype, factor: float, shape: tuple[int, ...]
) -> None:
    """Ties, subnormal numbers, overflow, infinities, NaN: every bit pattern times a factor."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int16)[: int(np.prod(shape))]
    x = patterns.view(dtype).reshape(shape)
    zero, weight = torch.zeros(shape[1]), torch.full((shape[1],), float(factor))
    y = ops.normalize(x, zero, zero + 1, weight, None, None, None, 1, 0.0, "none")
    assert torch.equal(y.nan_to_num(7), (x.float() * factor).to(dtype).nan_to_num(7))
    assert torch.equal(y.isnan(), x.isnan())


# How many roundings of float32 the kernels' exponential and error function are off, at most.
FUNCTIONS = {"silu": 3, "sigmoid": 3, "tanh": 4, "gelu": 4, "hardswish": 2, "relu6": 1}


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations_are_exact_to_a_few_roundings(backend: str, activation: str) -> None:
    """On a fine grid, each value for itself, and the slope that the backward takes."""
    z = torch.cat([torch.linspace(-12, 12, 20_001), torch.logspace(-9, -1, 1000)])[:, None]
    one, zero = torch.ones(1), torch.zeros(1)
    constants = (zero, one, None, None, None)
    y = ops.normalize(z, *constants, None, 1, 0.0, activation)
    slope, _ = ops.backward_input(
        torch.ones_like(z), z, *constants, None, None, None, None, 1, 0.0, activation, False
    )
    value, derivative, _ = ACTIVATIONS[activation]
    # Where gelu, silu and the slopes cancel, the error is that of the terms: of |z| and of 1.
    expected = value(array(z))
    terms = np.abs(array(z)) if activation == "gelu" else np.abs(expected)
    assert_near(y, expected, terms, FUNCTIONS[activation])
    assert_near(slope, derivative(array(z)), 1 + np.abs(array(z)), FUNCTIONS[activation])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 1e30, -1e30])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values_give_what_pytorch_gives(
    backend: str, activation: str, value: float
) -> None:
    """In eval mode: where an exponential overflows, where 0 * inf would be NaN."""
    x = torch.tensor([[1.0, -1.0], [value, value]])
    one, zero = torch.ones(2), torch.zeros(2)
    y = ops.normalize(x, zero, one, None, None, None, None, 1, 0.0, activation)
    name, _, slope = activation.rstrip(")").partition("(")
    function = getattr(torch.nn.functional, name, lambda z: z)
    expected = function(x, float(slope)) if slope else function(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


# Threads, memory


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [*LARGE, (40, 48, 9, 9), (64, 300, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS[1:])  # the reference sums as torch does
def test_one_thread_and_two_give_the_same_bits(
    name: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    p = Case(shape, layout=layout, dtype=dtype, residual=layout).tensors()
    end = (None, 1, 1e-5, "relu")

    def everything() -> list[Tensor]:
        y, m = ops.train_forward(p.x, p.weight, p.bias, p.residual, *end)
        gradients = ops.train_backward(p.dy, p.x, m, p.weight, p.bias, p.residual, None, *end, True)
        return [y, m, ops.moments(p.x, None, 1), *gradients]

    with cpu.force(name):
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(2)
        two = everything()
    assert all(map(torch.equal, two, one))


# Caches of the second and last level that lead the loops every way through a small tensor.
HUGE = 1 << 60
WAYS = {"streamed": (HUGE, 0), "pipelined": (0, HUGE), "pipelined and streamed": (0, 0)}
# Runs that are whole lines and runs that are not, channels that are whole blocks and that are not.
PLANES = [
    (3, 2, 8), (1, 5, 9), (2, 3, 16), (2, 6, 5, 7), (3, 64, 7, 7), (2, 131, 3, 5), (2, 40, 14, 14),
    (2, 9, 40, 40), (5, 3, 1033), (2, 1, 139999),
]  # fmt: skip


def everything(case: Case) -> list[Tensor]:
    """What each operator makes of the case."""
    p, wanted = case.tensors(), case.residual is not None
    m = ops.moments(p.x, None, 1)
    constants = (m[1], m[2] / m[0], p.weight, p.bias, p.residual)
    end = (None, *arguments(p))
    y, moments = ops.train_forward(p.x, p.weight, p.bias, p.residual, *end)
    kept = (None, y) if wanted else (p.residual, None)
    gradients = ops.train_backward(p.dy, p.x, moments, p.weight, p.bias, *kept, *end, wanted)
    sums = ops.backward_reduce(p.dy, p.x, *constants, None, *end)
    sides = (sums, m[0], *arguments(p), wanted)
    given_sums = ops.backward_input(p.dy, p.x, *constants, None, None, *sides)
    in_eval = ops.eval_backward(p.dy, p.x, *constants, None, *end, wanted)
    eval_y = ops.normalize(p.x, *constants, *end)
    results = [m, y, moments, *gradients, sums, *given_sums, *in_eval, eval_y]
    return [r for r in results if r is not None]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_every_way_through_memory_gives_the_same_bits(
    backend: str, shape: tuple[int, ...], layout: str, way: str
) -> None:
    """Which loops run depends on the size of the caches; what they compute does not."""
    for dtype in DTYPES:
        for activation, residual in (("none", None), ("relu", None), ("relu", layout)):
            case = Case(shape, dtype=dtype, layout=layout, activation=activation, residual=residual)
            usual = everything(case)
            with cpu.assume_caches(*WAYS[way]):
                assert all(map(torch.equal, everything(case), usual))
                if dtype == torch.float32:
                    check_training(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_written_but_the_output(backend: str, layout: str) -> None:
    p = Case((3, 5, 6, 7), layout=layout, residual=layout, activation="relu").tensors()
    given_tensors = (p.x, p.dy, p.weight, p.bias, p.residual, p.mean, p.var)
    before = [t.clone() for t in given_tensors]
    check_training(p.case)
    y, m = ops.train_forward(p.x, p.weight, p.bias, p.residual, None, *arguments(p))
    ops.train_backward(p.dy, p.x, m, p.weight, p.bias, None, y, None, *arguments(p), True)
    assert all(map(torch.equal, given_tensors, before))


# Running statistics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_update_running(backend: str, momentum: float | None, dtype: torch.dtype) -> None:
    x = torch.randn(11, 5, dtype=torch.float64) * 3 + 2
    m = ops.moments(x, None, 1)
    mean, var = torch.randn(5).to(dtype), torch.rand(5).to(dtype)
    factor = 1 / 4 if momentum is None else momentum
    expected_mean = (1 - factor) * array(mean) + factor * array(x).mean(0)
    expected_var = (1 - factor) * array(var) + factor * array(x).var(0, ddof=1)
    tracked, rejected = torch.tensor(3), torch.tensor(0)
    ops.update_running(mean, var, tracked, rejected, m, momentum, "propagate")
    # The new value is computed in double and rounded once, to the buffer's dtype.
    assert_near(mean, expected_mean, 1 + np.abs(array(x).mean(0)), 4, torch.float64)
    assert_near(var, expected_var, 1 + array(x).var(0), 4, torch.float64)
    assert (tracked.item(), rejected.item()) == (4, 0)


def test_update_running_from_no_element_changes_nothing(backend: str) -> None:
    mean, var, tracked = torch.randn(5), torch.rand(5), torch.tensor(3)
    before = mean.clone(), var.clone()
    ops.update_running(
        mean, var, tracked, None, torch.zeros(3, 5, dtype=torch.float64), 0.1, "propagate"
    )
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert tracked == 3


# The schema


def samples(name: str, present: dict[str, bool], layout: str) -> tuple[Any, ...]:
    """Arguments of an operator, with the optional ones there or not."""
    p = Case((2, 3, 4, 5), layout=layout, residual=layout, mask=True, activation="relu").tensors()

    def maybe(argument: str, value: Any) -> Any:
        return value if present[argument] else None

    weight, bias = maybe("weight", p.weight), maybe("bias", p.bias)
    residual, mask = maybe("residual", p.residual), maybe("mask", p.mask)
    output = maybe("output", torch.randn_like(p.x).relu_())
    m = ops.moments(p.x, mask, 1)
    constants = (p.mean.double(), p.var.double(), weight, bias, residual)
    sums = torch.randn(2, 3, dtype=torch.float64)
    end = (1, 1e-5, "relu" if present["activation"] else "none")
    wants = present["residual"]
    arguments_of: dict[str, tuple[Any, ...]] = {
        "moments": (p.x, mask, 1),
        "normalize": (p.x, *constants, mask, *end),
        "train_forward": (p.x, weight, bias, residual, mask, *end),
        "update_running": (
            torch.zeros(3),
            torch.ones(3),
            maybe("weight", torch.tensor(1)),
            maybe("bias", torch.tensor(0)),
            m,
            0.1 if present["activation"] or not present["weight"] else None,
            "skip" if present["mask"] else "propagate",
        ),
        "backward_reduce": (p.dy, p.x, *constants, output, mask, *end),
        "backward_input": (
            *(p.dy, p.x, *constants, output, mask),
            *(maybe("sums", sums), maybe("count", m[0]), *end, wants),
        ),
        "train_backward": (p.dy, p.x, m, weight, bias, residual, output, mask, *end, wants),
        "eval_backward": (p.dy, p.x, *constants, output, mask, *end, wants),
    }
    return arguments_of[name]


OPTIONAL = ("weight", "bias", "residual", "mask", "output", "activation", "sums", "count")


def on_and_off(name: str) -> list[dict[str, bool]]:
    """None of the optional arguments, each alone, and all of them."""
    schema = str(getattr(torch.ops.normwise, name).default._schema)
    own = [a for a in OPTIONAL if f" {a}" in schema]
    if name == "update_running":
        own = ["weight", "bias", "mask", "activation"]
    sets = sorted({frozenset(), *(frozenset({a}) for a in own), frozenset(own)}, key=sorted)
    return [{a: a in s for a in OPTIONAL} for s in sets]


# Those of sets of neighbours (layer, group norm) are checked in test_set_operators.py.
OF_CHANNELS = [name for name in ops.OPERATORS if not name.startswith("sets_")]
OPCHECKS = [
    (name, present, layout)
    for name in OF_CHANNELS
    for present in on_and_off(name)
    for layout in LAYOUTS[: 2 if present["activation"] else 1]
]


@pytest.mark.parametrize(
    ("name", "present", "layout"),
    OPCHECKS,
    ids=[
        "-".join([name, layout, *(a for a in OPTIONAL if present[a])])
        for name, present, layout in OPCHECKS
    ],
)
def test_opcheck(name: str, present: dict[str, bool], layout: str) -> None:
    """Schema, fake kernel (shapes, dtypes, strides) and behaviour under torch.compile agree."""
    operator = getattr(torch.ops.normwise, name).default
    result = torch.library.opcheck(operator, samples(name, present, layout))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OF_CHANNELS)
def test_opcheck_of_the_reference(name: str) -> None:
    with cpu.force(None):
        for present, layout in itertools.product(on_and_off(name)[:4], ("transposed", "sliced")):
            operator = getattr(torch.ops.normwise, name).default
            tests = ("test_schema", "test_faketensor")
            result = torch.library.opcheck(
                operator, samples(name, present, layout), test_utils=tests
            )
            assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", [n for n in OF_CHANNELS if n != "update_running"])
def test_the_short_cut_past_the_dispatcher_is_the_operator(backend: str, name: str) -> None:
    everything = dict.fromkeys(OPTIONAL, True)
    args = samples(name, everything, "contiguous")
    direct, dispatched = getattr(ops, name)(*args), getattr(torch.ops.normwise, name)(*args)
    if isinstance(direct, Tensor):
        direct, dispatched = (direct,), (dispatched,)
    assert all(map(torch.equal, direct, dispatched))
