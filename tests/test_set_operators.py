"""sets_forward and sets_backward on every backend against the oracle, and the direct calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, SUM, array, assert_near
from oracle import ACTIVATIONS
from set_oracle import SetNorm
from torch import Tensor

import normwise as nw
from normwise import ops
from normwise.functional import sets
from normwise.ops import cpu

View = tuple[int, int, int, int]

# Sets shorter than every vector, around its width, past it; runs by columns and with constants of
# their own (from 4 vectors on), with and without a rest.
VIEWS: list[View] = [
    (1, 1, 1, 1),
    (5, 1, 3, 1),
    (3, 1, 7, 1),
    (3, 1, 8, 1),
    (3, 1, 9, 1),
    (17, 1, 31, 1),
    (2, 1, 64, 1),
    (70, 1, 100, 1),
    (5, 2, 6, 1),
    (3, 2, 3, 6),
    (2, 3, 5, 15),
    (3, 2, 3, 35),
    (2, 3, 2, 49),
    (2, 2, 4, 64),
    (4, 5, 1, 3),
    (2, 5, 1, 24),
    (2, 3, 1, 143),
]
# Pieces of 65536 values; 64 blocks of samples; few samples of many columns; tiles with a rest.
LARGE: list[View] = [
    (2, 1, 139_999, 1),
    (3, 1, 2, 70_001),
    (1, 2, 1, 139_999),
    (1500, 1, 33, 1),
    (9, 1, 9001, 1),
    (5, 3, 2000, 7),
]


class Problem:
    """Random operands of one call; sets differ in mean and spread."""

    def __init__(
        self,
        view: View,
        dtype: torch.dtype = torch.float32,
        parameters: tuple[bool, bool] = (True, True),
        residual: bool = False,
        activation: str = "none",
        centred: bool = True,
        offset: float = 0.0,
        own: torch.dtype | None = None,
    ) -> None:
        g = torch.Generator().manual_seed(sum(view))

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        n, groups, runs, _ = self.view = view
        spread = 0.5 + torch.rand((n, groups, 1, 1), generator=g, dtype=torch.float64)
        self.x = ((draw(*view) + draw(n, groups, 1, 1)) * spread + offset).to(dtype)
        self.dy = draw(*view).to(dtype)
        own = own or dtype
        self.weight = (1 + 0.5 * draw(groups * runs)).to(own) if parameters[0] else None
        self.bias = draw(groups * runs).to(own) if parameters[1] else None
        self.residual = draw(*view).to(dtype) if residual else None
        self.activation, self.centred = activation, centred
        self.options = (view, 1e-5, activation, centred)

    def forward(self) -> tuple[Tensor, Tensor]:
        y, moments = ops.sets_forward(self.x, self.weight, self.bias, self.residual, *self.options)
        return y, moments

    def backward(self, moments: Tensor | None, output: Tensor | None = None) -> Any:
        return ops.sets_backward(
            self.dy, self.x, moments, self.weight, self.bias, self.residual, output,
            *self.options, True,
        )  # fmt: skip

    def oracle(self) -> SetNorm:
        return SetNorm(
            array(self.x), array(self.weight), array(self.bias), array(self.residual), eps=1e-5,
            activation=self.activation, centred=self.centred,
        )  # fmt: skip

    def check(self) -> None:
        """The output, its moments, and the gradients by them, without them and by the output."""
        oracle, dtype = self.oracle(), self.x.dtype
        y, moments = self.forward()
        xhat, rstd = oracle.normalized
        mean, var = oracle.statistics
        size = self.view[2] * self.view[3]
        # What the rounding of a mean to float64 is in roundings of xhat.
        away = 1 + np.abs(mean * rstd).max() * (2.0**-29 if dtype != torch.float64 else 1.0)
        gamma = np.abs(oracle.spread(oracle.weight, 1)).max()
        assert_near(
            y, oracle.forward(), away * (np.abs(oracle.before_activation).max() + gamma),
            computed=dtype,
        )  # fmt: skip
        assert (moments[0] == size).all()
        scale = np.sqrt(var).reshape(-1) + np.abs(mean).reshape(-1) * 2.0**-28
        assert_near(moments[1], mean.reshape(-1), scale, SUM, dtype)
        assert_near(moments[2], size * var.reshape(-1), size * scale**2 + 1e-30, SUM, dtype)

        expected = oracle.gradients(array(self.dy))
        flow = np.abs(expected.dresidual).max() * (1 + np.abs(xhat).max()) ** 2 * away
        flow = flow * max(1.0, gamma)
        ways: list[tuple[Tensor | None, Tensor | None]] = [(moments, None), (None, None)]
        if self.residual is not None and self.activation == "relu":
            ways.append((moments, y))
        for given, output in ways:
            dx, dresidual, dweight, dbias = self.backward(given, output)
            assert dx.dtype == dresidual.dtype == dtype
            largest = flow * rstd.max(axis=(1, 2, 3), keepdims=True)
            assert_near(dx, expected.dx, largest, computed=dtype)
            assert_near(dresidual, expected.dresidual, flow, computed=dtype)
            terms = flow * (self.view[0] * self.view[3]) ** 0.5
            for found, parameter, wanted in (
                (dweight, self.weight, expected.dweight),
                (dbias, self.bias, expected.dbias),
            ):
                if parameter is not None:
                    assert found.dtype == parameter.dtype
                    assert_near(found, wanted, terms, computed=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_every_size_and_dtype(backend: str, view: View, dtype: torch.dtype) -> None:
    Problem(view, dtype).check()
    Problem(view, dtype, (True, False), centred=False).check()


@pytest.mark.parametrize("view", LARGE, ids=str)
def test_sets_in_pieces_and_blocks(backend: str, view: View) -> None:
    for dtype in (torch.float32,) if backend == "reference" else (torch.float32, torch.bfloat16):
        Problem(view, dtype).check()
    if backend != "reference":
        Problem(view, torch.float32, (False, False)).check()


@pytest.mark.parametrize("view", [(70, 1, 100, 1), (3, 2, 3, 35), (3, 2, 3, 6), (2, 3, 1, 143)],
                         ids=str)  # fmt: skip
def test_streamed_results(backend: str, view: View) -> None:
    """Tensors past the last cache are written by whole lines; their ends as usual."""
    with cpu.assume_caches(0, 0):
        for dtype in DTYPES:
            Problem(view, dtype, activation="relu", residual=True).check()
            Problem(view, dtype).check()


@pytest.mark.parametrize("view", [(5, 1, 3, 1), (17, 1, 31, 1), (3, 2, 3, 35)], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual(backend: str, activation: str, residual: bool, view: View) -> None:
    Problem(view, activation=activation, residual=residual).check()


@pytest.mark.parametrize("parameters", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("view", [(5, 1, 3, 1), (17, 1, 31, 1), (3, 2, 3, 35)], ids=str)
def test_parameters_on_and_off(backend: str, view: View, parameters: tuple[bool, bool]) -> None:
    Problem(view, parameters=parameters, activation="silu").check()
    Problem(view, torch.bfloat16, parameters, own=torch.float32).check()


@pytest.mark.parametrize("offset", [1e4, -1e6])
@pytest.mark.parametrize("view", [(5, 1, 3, 1), (17, 1, 768, 1), (3, 2, 3, 350)], ids=str)
def test_data_far_from_zero(backend: str, view: View, offset: float) -> None:
    Problem(view, offset=offset).check()


UNEVEN: dict[str, Callable[[Tensor], Tensor]] = {
    "first value": lambda v: v[:, 0].add_(1e6),
    "first vector": lambda v: v[:, :32].add_(3000),
    "last value": lambda v: v[:, -1].add_(1e6),
    "ramp": lambda v: v.add_(torch.arange(v.shape[1])),
    "heavy tails": lambda v: v.div_(v.flip(1).abs() + 1e-3),
}


@pytest.mark.parametrize("kind", UNEVEN)
@pytest.mark.parametrize("centred", [True, False], ids=["", "rms"])
def test_rows_whose_first_values_mislead(backend: str, kind: str, centred: bool) -> None:
    p = Problem((6, 1, 1000, 1), centred=centred)
    UNEVEN[kind](p.x.view(6, 1000))
    y, _ = p.forward()
    oracle = p.oracle()
    xhat = np.abs(oracle.normalized[0]).max()
    assert_near(y, oracle.forward(), np.abs(oracle.before_activation) + xhat)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 1.1e18, 1e-30])
@pytest.mark.parametrize("view", [(3, 1, 5, 1), (3, 1, 33, 1), (3, 2, 3, 35)], ids=str)
def test_constant_sets_are_their_mean(backend: str, view: View, value: float) -> None:
    p = Problem(view)
    p.x.fill_(value)
    y, moments = p.forward()
    assert (moments[1] == p.x.flatten()[0]).all()
    assert not moments[2].any()
    assert torch.equal(y, p.bias.reshape(1, view[1], view[2], 1).expand(view))


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38])
@pytest.mark.parametrize("view", [(6, 1, 5, 1), (6, 1, 40, 1), (6, 2, 3, 35)], ids=str)
def test_one_bad_set_leaves_the_others_as_they_were(backend: str, view: View, value: float) -> None:
    p = Problem(view)
    good = [p.forward()[0], p.backward(None)[0]]
    p.x[2, 0, 0, 0] = value
    bad = [p.forward()[0], p.backward(None)[0]]
    rest = [0, 1, 3, 4, 5]
    assert all(torch.equal(a[rest], b[rest]) for a, b in zip(good, bad, strict=True))


@pytest.mark.parametrize("view", [*LARGE, (300, 1, 256, 1), (8, 4, 8, 144)], ids=str)
def test_any_number_of_threads_computes_the_same_bits(
    threads: None, backend: str, view: View
) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's own sums")
    p = Problem(view, activation="relu", residual=True)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        y, moments = p.forward()
        found.append([y, moments, *p.backward(moments), *p.backward(None)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("view", [(3, 1, 20, 1), (2, 2, 3, 40)], ids=str)
def test_operators_keep_their_promises(view: View, activation: str) -> None:
    p = Problem(view, residual=True, activation=activation)
    forward = (p.x, p.weight, p.bias, p.residual, *p.options)
    torch.library.opcheck(torch.ops.normwise.sets_forward.default, forward)
    _, moments = p.forward()
    backward = (p.dy, p.x, moments, p.weight, p.bias, p.residual, None, *p.options, True)
    torch.library.opcheck(torch.ops.normwise.sets_backward.default, backward)


# The direct calls


@pytest.fixture
def undirected(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def switch() -> None:
        monkeypatch.setattr(ops, "direct_forward", lambda *_: None)
        monkeypatch.setattr(ops, "direct_backward", lambda *_: None)

    return switch


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_direct_and_by_operators_are_the_same_bits(
    undirected: Callable[[], None], name: str, activation: str | None
) -> None:
    x, residual, dy = torch.randn(3, 4, 6, 40)
    function = getattr(nw.functional, name)
    size = 40 if name in ("layer_norm", "rms_norm") else 6
    weight, bias = torch.randn(2, size)
    parameters = {"weight": weight.requires_grad_()}
    if name != "rms_norm":
        parameters["bias"] = bias.requires_grad_()
    first = {"layer_norm": (40,), "rms_norm": (40,), "group_norm": (3,), "instance_norm": ()}[name]

    def call() -> list[Tensor]:
        inputs = [x.requires_grad_(), residual.requires_grad_(), *parameters.values()]
        y = function(x, *first, **parameters, residual=residual, activation=activation)
        with torch.no_grad():
            unrecorded = function(x, *first, **parameters, residual=residual, activation=activation)
        return [y, unrecorded, *torch.autograd.grad(y, inputs, dy)]

    direct = call()
    undirected()
    assert all(map(torch.equal, direct, call()))


def test_which_calls_are_direct() -> None:
    if not cpu.instruction_sets():
        pytest.skip("no kernels here")
    x, weight = torch.randn(4, 6, 8), torch.randn(8)

    def served(x: Tensor, weight: Tensor | None = weight, spec: sets.Spec = (8,)) -> bool:
        return sets.direct(x, spec, weight, None, None, 1e-5, None) is not None

    assert served(x)
    assert served(x, weight.double())
    assert served(x, None, 3)
    assert not served(x.transpose(0, 1))
    assert not served(x, weight[:7])
    assert not served(x, spec=(7,))
    assert not served(x, None, 4)
    assert not served(x._neg_view())
    assert not served(torch.empty(0, 8))
    with torch.device("meta"):
        assert not served(torch.empty(4, 8), None)


def test_a_gradient_that_is_expanded_takes_the_operators() -> None:
    x, weight = torch.randn(5, 12, requires_grad=True), torch.randn(12, requires_grad=True)
    dy = torch.randn(5, 1).expand(5, 12)
    found = []
    for cotangent in (dy, dy.contiguous()):
        y = nw.functional.layer_norm(x, 12, weight)
        found.append(torch.autograd.grad(y, (x, weight), cotangent))
    assert all(map(torch.equal, *found))
