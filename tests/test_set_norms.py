"""layer_norm, rms_norm, group_norm and instance_norm against the float64 oracle; derivatives."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cases import array, assert_near
from set_oracle import SetNorm
from torch import Tensor
from torch.testing import assert_close

import normwise as nw

F64 = torch.float64


@dataclass(frozen=True)
class Norm:
    """A function in words: its input, and the view in which it is the oracle's."""

    name: str
    shape: tuple[int, ...]
    view: tuple[int, int, int, int]
    centred: bool = True

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.name == "layer2d" else (self.view[1] * self.view[2],)

    def __call__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, **options: Any
    ) -> Tensor:
        F = nw.functional
        if self.name.startswith("layer"):
            return F.layer_norm(x, self.parameter_shape, weight, bias, eps, **options)
        if self.name == "rms":
            return F.rms_norm(x, self.parameter_shape, weight, eps, **options)
        if self.name == "instance":
            return F.instance_norm(x, None, None, weight, bias, True, 0.1, eps, **options)
        return F.group_norm(x, self.view[1], weight, bias, eps, **options)


NORMS = {
    str(n.name) + "x".join(map(str, n.shape)): n
    for n in (
        Norm("layer", (3, 4, 33), (12, 1, 33, 1)),
        Norm("layer2d", (4, 5, 7), (4, 1, 35, 1)),
        Norm("rms", (3, 4, 33), (12, 1, 33, 1), False),
        Norm("group", (3, 6, 5, 7), (3, 2, 3, 35)),  # runs with constants of their own
        Norm("group", (3, 6, 2, 3), (3, 2, 3, 6)),
        Norm("group", (5, 12), (5, 2, 6, 1)),
        Norm("instance", (3, 5, 4, 6), (3, 5, 1, 24)),
        Norm("instance", (3, 5, 17), (3, 5, 1, 17)),
    )
}  # fmt: skip
PARAMETERS = {"both": (True, True), "weight": (True, False), "bias": (False, True), "none": (0, 0)}


class Problem:
    def __init__(
        self,
        norm: Norm,
        dtype: torch.dtype = F64,
        parameters: str = "both",
        residual: bool = False,
        activation: str = "none",
        offset: float = 0.0,
        scale: float = 1.0,
        parameter_dtype: torch.dtype | None = None,
    ) -> None:
        self.norm, self.activation = norm, activation
        seed = repr((norm, dtype, parameters, residual, activation, offset, scale))
        g = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=g, dtype=F64)

        # Sets differ in scale and offset.
        n, groups, _, _ = norm.view
        spread = torch.rand((n, groups, 1, 1), generator=g, dtype=F64) + 0.5
        x = (draw(norm.view) + draw((n, groups, 1, 1))) * spread + offset
        own = parameter_dtype or dtype
        weight, bias = PARAMETERS[parameters]
        self.x = (x * scale).reshape(norm.shape).to(dtype)
        self.weight = (1 + 0.7 * draw(norm.parameter_shape)).to(own) if weight else None
        self.bias = draw(norm.parameter_shape).to(own) if bias and norm.name != "rms" else None
        self.residual = draw(norm.shape).to(dtype) if residual else None
        self.dy = draw(norm.shape).to(dtype)

    @property
    def options(self) -> dict[str, Any]:
        return {"residual": self.residual, "activation": self.activation}

    def oracle(self, eps: float = 1e-5) -> SetNorm:
        view = self.norm.view
        residual = None if self.residual is None else array(self.residual).reshape(view)
        return SetNorm(
            array(self.x).reshape(view), array(self.weight), array(self.bias), residual,
            eps=eps, activation=self.activation, centred=self.norm.centred,
        )  # fmt: skip

    def inputs(self) -> list[Tensor]:
        given = (self.x, self.weight, self.bias, self.residual)
        return [t.requires_grad_() for t in given if t is not None]

    def run(self, eps: float = 1e-5) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = self.inputs()
        y = self.norm(self.x, self.weight, self.bias, eps, **self.options)
        found = torch.autograd.grad(y, inputs, self.dy)
        names = [n for n in ("x", "weight", "bias", "residual") if getattr(self, n) is not None]
        return y.detach(), dict(zip(names, found, strict=True))

    def check(self, y: Tensor, gradients: dict[str, Tensor] | None) -> None:
        oracle, view = self.oracle(), self.norm.view
        before = (
            np.abs(oracle.before_activation).max() + np.abs(oracle.spread(oracle.weight, 1)).max()
        )
        assert_near(y.reshape(view), oracle.forward(), before, computed=self.x.dtype)
        if gradients is None:
            return
        expected = oracle.gradients(array(self.dy).reshape(view))
        xhat, rstd = oracle.normalized
        flow = np.abs(expected.dresidual).max() * (1 + np.abs(xhat).max()) ** 2
        flow = flow * max(1.0, np.abs(oracle.spread(oracle.weight, 1)).max())
        largest = rstd.max(axis=(1, 2, 3), keepdims=True) * flow
        assert_near(gradients["x"].reshape(view), expected.dx, largest, computed=self.x.dtype)
        if "residual" in gradients:
            assert_near(gradients["residual"].reshape(view), expected.dresidual, flow)
        terms = view[0] * view[3]
        for name, value in (("weight", expected.dweight), ("bias", expected.dbias)):
            if name in gradients:
                total = gradients[name].reshape(-1)
                assert_near(total, value, flow * terms**0.5, computed=self.x.dtype)


SMOOTH = ("none", "silu")


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_outputs_and_gradients_are_the_oracles(
    norm: Norm, dtype: torch.dtype, parameters: str, residual: bool, activation: str
) -> None:
    problem = Problem(norm, dtype, parameters, residual, activation)
    problem.check(*problem.run())


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_every_backend(norm: Norm, backend: str) -> None:
    problem = Problem(norm, torch.float32, "both", True, "gelu", offset=1e4)
    problem.check(*problem.run())


@pytest.mark.parametrize("parameter_dtype", [None, torch.float32], ids=["own", "float32"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_half_types_round_once(
    norm: Norm, dtype: torch.dtype, residual: bool, parameter_dtype: torch.dtype | None
) -> None:
    problem = Problem(norm, dtype, "both", residual, parameter_dtype=parameter_dtype)
    y, gradients = problem.run()
    assert y.dtype == gradients["x"].dtype == dtype
    assert gradients["weight"].dtype == (parameter_dtype or dtype)
    problem.check(y, gradients)


@pytest.mark.parametrize("parameters", ["both", "none"])
@pytest.mark.parametrize("norm", [n for n in NORMS.values() if n.centred], ids=lambda n: n.name)
def test_a_mean_of_a_million(norm: Norm, parameters: str) -> None:
    """torch.nn's float32 norms are off by up to 0.1 here."""
    problem = Problem(norm, torch.float32, parameters, offset=1e6)
    problem.check(*problem.run())


@pytest.mark.parametrize("scale", [1e18, 1e-18], ids=str)
@pytest.mark.parametrize("parameters", ["both", "none"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_scales_whose_squares_leave_float32(norm: Norm, parameters: str, scale: float) -> None:
    problem = Problem(norm, torch.float32, parameters, scale=scale)
    problem.check(*problem.run())


@pytest.mark.parametrize("value", [0.0, 0.003, 3.7, -1e6, 1e30])
@pytest.mark.parametrize("norm", [n for n in NORMS.values() if n.centred], ids=lambda n: n.name)
def test_constant_rows_are_exactly_beta(norm: Norm, value: float) -> None:
    problem = Problem(norm, torch.float32)
    y = norm(torch.full(norm.shape, value), problem.weight, problem.bias, 1e-5)
    n, g, p, length = norm.view
    assert problem.bias is not None
    assert torch.equal(y.reshape(norm.view), problem.bias.reshape(g, p, 1).expand(n, g, p, length))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_row_that_is_not_finite_stays_alone(norm: Norm) -> None:
    problem = Problem(norm, torch.float32)
    clean = norm(problem.x, problem.weight, problem.bias, 1e-5)
    x = problem.x.reshape(norm.view).clone()
    x[0, 0, 0, 0] = torch.nan
    y = norm(x.reshape(norm.shape), problem.weight, problem.bias, 1e-5).reshape(norm.view)
    assert y[0, 0].isnan().all()
    assert_close(y[1:], clean.reshape(norm.view)[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_no_eps_is_no_division_by_zero_for_rows_that_vary(norm: Norm) -> None:
    problem = Problem(norm, torch.float32)
    if norm.name == "instance":
        with pytest.raises(ValueError, match="eps must be positive"):
            norm(problem.x, problem.weight, problem.bias, 0.0)
        return
    y = norm(problem.x, problem.weight, problem.bias, 0.0)
    expected = problem.oracle(0.0).forward()
    assert_near(y.reshape(norm.view), expected, 4.0)


# Derivatives


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_first_and_second_derivatives(norm: Norm, parameters: str, activation: str) -> None:
    """Among them layer norm with a bias and no weight, which torch.nn gets wrong twice derived."""
    problem = Problem(norm, F64, parameters, True, activation)

    def function(*inputs: Tensor) -> Tensor:
        given = iter(inputs)
        weight, bias = (None if v is None else next(given) for v in (problem.weight, problem.bias))
        x, residual = next(given), next(given)
        return norm(x, weight, bias, 1e-3, residual=residual, activation=activation)

    order = [problem.weight, problem.bias, problem.x, problem.residual]
    inputs = tuple(t.requires_grad_() for t in order if t is not None)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(
        function, inputs, fast_mode=True, check_fwd_over_rev=True, atol=1e-4
    )


def test_second_derivatives_where_weight_and_residual_come_from_the_input() -> None:
    x = torch.randn(4, 6, dtype=F64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return nw.functional.layer_norm(x, 6, x[0].exp(), None, residual=x.sin(), activation="silu")

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_gradient_of_the_gradient_in_float32(norm: Norm) -> None:
    """A gradient penalty, whose inner gradient the operators compute."""
    found = []
    for dtype in (torch.float32, F64):
        problem = Problem(norm, torch.float32)
        x, weight, dy = (t.detach().to(dtype) for t in (problem.x, problem.weight, problem.dy))
        x.requires_grad_()
        y = norm(x, weight, None, 1e-5)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0].double())
    assert_close(*found, rtol=1e-4, atol=1e-4 * float(found[1].abs().max()))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_vmap_over_inputs_and_over_parameters(norm: Norm) -> None:
    problem = Problem(norm)
    x = torch.stack([problem.x, problem.x + problem.dy, problem.dy])
    weight = torch.stack([problem.weight, 2 * problem.weight, -problem.weight])

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return norm(x, weight, problem.bias, 1e-5)

    expected = torch.stack([function(a, b) for a, b in zip(x, weight, strict=True)])
    assert_close(torch.vmap(function)(x, weight), expected, rtol=1e-11, atol=1e-12)
    one = torch.stack([function(x[0], b) for b in weight])
    assert_close(torch.vmap(function, (None, 0))(x[0], weight), one, rtol=1e-11, atol=1e-12)
    slopes = torch.func.vmap(torch.func.grad(lambda x, w: (function(x, w) * problem.dy).sum()))
    each = []
    for a, b in zip(x, weight, strict=True):
        leaf = a.clone().requires_grad_()
        each += torch.autograd.grad(function(leaf, b), leaf, problem.dy)
    assert_close(slopes(x, weight), torch.stack(each), rtol=1e-10, atol=1e-11)


# Masks and channel axes


def test_masked_instance_norm_is_that_of_the_valid_elements() -> None:
    x = torch.randn(3, 4, 9, dtype=F64)
    lengths = torch.tensor([9, 5, 2])
    mask = (torch.arange(9) < lengths[:, None])[:, None]
    weight, bias = torch.randn(2, 4, dtype=F64)
    y = nw.functional.instance_norm(x, None, None, weight, bias, mask=mask)
    for sample, out, length in zip(x, y, lengths, strict=True):
        packed = nw.functional.instance_norm(sample[None, :, :length], None, None, weight, bias)
        assert_close(out[None, :, :length], packed, rtol=1e-12, atol=1e-12)
        assert not out[:, length:].any()


def test_masked_padding_may_hold_anything_and_gets_no_gradient() -> None:
    x = torch.randn(2, 3, 6, dtype=F64)
    mask = torch.arange(6).expand(2, 1, 6) < 4
    cotangent = torch.randn_like(x)
    found = []
    for padding in (0.0, torch.nan):
        padded = x.masked_fill(~mask, padding).requires_grad_()
        y = nw.functional.instance_norm(padded, mask=mask, activation="silu")
        found.append((y.detach(), *torch.autograd.grad(y, padded, cotangent)))
    assert_close(*found)
    assert not found[0][1].masked_select(~mask).any()


@pytest.mark.parametrize("channel_dim", [2, -1])
@pytest.mark.parametrize("name", ["group_norm", "instance_norm"])
def test_the_axis_named_is_the_channels(name: str, channel_dim: int) -> None:
    x, residual = torch.randn(2, 3, 8, 6, dtype=F64)
    weight, bias = torch.randn(2, 6, dtype=F64)
    function: Callable[..., Tensor] = getattr(nw.functional, name)
    first = (3,) if name == "group_norm" else (None, None)
    y = function(x, *first, weight, bias, residual=residual, activation="relu",
                 channel_dim=channel_dim)  # fmt: skip
    expected = function(x.movedim(2, 1), *first, weight, bias, residual=residual.movedim(2, 1),
                        activation="relu")  # fmt: skip
    assert_close(y, expected.movedim(1, 2), rtol=0, atol=0)


@pytest.mark.parametrize(
    "shape",
    [(0, 6, 5), (3, 6, 0)],
    ids=str,
)
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.ones(6, requires_grad=True)
    for y in (
        nw.functional.group_norm(x, 2, weight),
        nw.functional.instance_norm(x, weight=weight),
    ):
        y.backward(torch.ones(shape))
        assert y.shape == shape
        assert torch.equal(weight.grad, torch.zeros(6))
    rows = torch.randn(shape[0], shape[2], requires_grad=True)
    y = nw.functional.layer_norm(rows, shape[2], torch.ones(shape[2]))
    assert y.shape == rows.shape
    assert nw.functional.rms_norm(rows, shape[2]).shape == rows.shape


# Errors, each with torch.nn's type


F = nw.functional
x46 = torch.ones(4, 6)
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (
        lambda: F.layer_norm(x46.long(), 6),
        NotImplementedError,
        "layer norm takes float64",
    ),
    "shape": (
        lambda: F.layer_norm(x46, [7]),
        RuntimeError,
        r"Given normalized_shape=\[7\], expected input",
    ),
    "rank": (
        lambda: F.rms_norm(x46, [1, 4, 6]),
        RuntimeError,
        r"Given normalized_shape=\[1, 4, 6\]",
    ),
    "no shape": (
        lambda: F.layer_norm(x46, []),
        RuntimeError,
        "normalized_shape to be at least 1-dim",
    ),
    "weight": (
        lambda: F.rms_norm(x46, 6, torch.ones(4)),
        RuntimeError,
        "Expected weight to be of same shape",
    ),
    "bias": (
        lambda: F.layer_norm(x46, 6, None, torch.ones(1, 6)),
        RuntimeError,
        r"Try: bias.reshape\(6,\)",
    ),
    "negative eps": (lambda: F.layer_norm(x46, 6, eps=-1), ValueError, "eps .* is not negative"),
    "residual": (
        lambda: F.layer_norm(x46, 6, residual=x46[0]),
        ValueError,
        "residual has the shape",
    ),
    "residual of integers": (
        lambda: F.rms_norm(x46, 6, residual=x46.long()),
        TypeError,
        "residual is a floating",
    ),
    "activation": (
        lambda: F.group_norm(x46, 2, activation="swish"),
        ValueError,
        "activation names",
    ),
    "groups": (lambda: F.group_norm(x46, 4), RuntimeError, "divisible by num_groups"),
    "no groups": (lambda: F.group_norm(x46, 0), ValueError, "divisible by num_groups"),
    "one value": (
        lambda: F.group_norm(x46[:1], 6),
        ValueError,
        "Expected more than 1 value per channel",
    ),
    "channels": (
        lambda: F.group_norm(x46, 2, torch.ones(4)),
        RuntimeError,
        "a vector of size equal to",
    ),
    "a vector": (lambda: F.group_norm(x46[0], 2), RuntimeError, "Expected at least 2 dimensions"),
    "channel_dim": (
        lambda: F.group_norm(x46, 2, channel_dim=2),
        ValueError,
        "channel_dim names an axis",
    ),
    "batch axis": (
        lambda: F.instance_norm(x46[None], channel_dim=0),
        ValueError,
        "not the batch's",
    ),
    "one position": (
        lambda: F.instance_norm(x46),
        ValueError,
        "Expected more than 1 spatial element",
    ),
    "no statistics": (
        lambda: F.instance_norm(x46[None], use_input_stats=False),
        RuntimeError,
        "Expected running_mean and",
    ),
    "mask": (lambda: F.instance_norm(x46[None], mask=x46[None]), TypeError, "mask is boolean"),
    "mask shape": (
        lambda: F.instance_norm(x46[None], mask=x46[None] > 0),
        ValueError,
        "mask broadcasts over all axes but",
    ),
    "instance weight": (
        lambda: F.instance_norm(x46[None], weight=torch.ones(6)),
        RuntimeError,
        "weight has one value for each",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, text = ERRORS[name]
    with pytest.raises(kind, match=text):
        call()
