"""Bad input gets the invariant, what came, and what to try, as an exception torch.nn's users catch.

Each case: the call, then what its message must hold in this order. Where torch.nn refuses the same
input, our exception is an instance of the type that torch.nn raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.errors import DtypeError, InputError, NonFiniteError, NormwiseError, message


class Case(NamedTuple):
    call: Callable[[], Any]
    error: type[NormwiseError]
    invariant: str
    got: str
    hint: str
    peer: Callable[[], Any] | None = None


def x(*shape: int) -> Tensor:
    return torch.ones(shape).cumsum(0)


def ones(n: int) -> Tensor:
    return torch.ones(n)


def f(*args: Any, **kwargs: Any) -> Tensor:
    return nw.functional.batch_norm(*args, **kwargs)


def g(*args: Any, **kwargs: Any) -> Tensor:
    return nn.functional.batch_norm(*args, **kwargs)


def train(t: Tensor, **kwargs: Any) -> Tensor:
    return f(t, None, None, training=True, **kwargs)


CASES: dict[str, Case] = {
    # rank
    "1d layer, 4d input": Case(
        lambda: nw.nn.BatchNorm1d(3)(x(2, 3, 4, 4)),
        InputError,
        "expected 2D or 3D input",
        "4D input of shape (2, 3, 4, 4)",
        "normwise.nn.BatchNorm",
        lambda: nn.BatchNorm1d(3)(x(2, 3, 4, 4)),
    ),
    "2d layer, one image": Case(
        lambda: nw.nn.BatchNorm2d(3)(x(3, 4, 4)),
        InputError,
        "expected 4D input",
        "3D input of shape (3, 4, 4)",
        "x.unsqueeze(0)",
        lambda: nn.BatchNorm2d(3)(x(3, 4, 4)),
    ),
    "3d layer, 4d input": Case(
        lambda: nw.nn.BatchNorm3d(3)(x(2, 3, 4, 4)),
        InputError,
        "expected 5D input",
        "4D input",
        "x.unsqueeze(0)",
        lambda: nn.BatchNorm3d(3)(x(2, 3, 4, 4)),
    ),
    "any rank, a vector": Case(
        lambda: nw.nn.BatchNorm(3, channel_dim=0)(x(3)),
        InputError,
        "rank 2 or more",
        "shape (3,)",
        "x.unsqueeze(0)",
    ),
    "any rank, a number": Case(
        lambda: nw.nn.BatchNorm(3, channel_dim=0)(torch.tensor(1.0)),
        InputError,
        "channel_dim names an axis",
        "shape ()",
        "rank 2 or more",
    ),
    # channels
    "wrong channel count": Case(
        lambda: nw.nn.BatchNorm2d(3)(x(2, 4, 5, 5)),
        InputError,
        "one value for each channel, shape (4,)",
        "of shape (3,) for an input of shape (2, 4, 5, 5), whose channel axis is 1",
        "num_features=4",
        lambda: nn.BatchNorm2d(3)(x(2, 4, 5, 5)),
    ),
    "wrong channel count in eval": Case(
        lambda: nw.nn.BatchNorm2d(3).eval()(x(2, 4, 5, 5)),
        InputError,
        "one value for each channel, shape (4,)",
        "of shape (3,)",
        "num_features=4",
        lambda: nn.BatchNorm2d(3).eval()(x(2, 4, 5, 5)),
    ),
    "channel-last data in a channel-first layer": Case(
        lambda: nw.nn.BatchNorm2d(3)(x(2, 5, 5, 3)),
        InputError,
        "shape (5,)",
        "(2, 5, 5, 3)",
        "channel_dim=",
    ),
    "channel_dim too large": Case(
        lambda: nw.nn.BatchNorm2d(3, channel_dim=4)(x(2, 3, 5, 5)),
        InputError,
        "channel_dim names an axis of the input",
        "channel_dim=4 for an input of shape (2, 3, 5, 5)",
        "a number from -4 to 3",
    ),
    "channel_dim too small": Case(
        lambda: nw.functional.batch_moments(x(2, 3), channel_dim=-3),
        InputError,
        "channel_dim names an axis of the input",
        "channel_dim=-3",
        "a number from -2 to 1",
    ),
    "running mean of the wrong size": Case(
        lambda: f(x(2, 3), ones(4), ones(3)),
        InputError,
        "running_mean has one value for each channel, shape (3,)",
        "running_mean of shape (4,)",
        "num_features=3",
        lambda: g(x(2, 3), ones(4), ones(3)),
    ),
    "running variance of the wrong size": Case(
        lambda: f(x(2, 3), ones(3), ones(4), training=True),
        InputError,
        "running_var has one value for each channel, shape (3,)",
        "running_var of shape (4,)",
        "num_features=3",
        lambda: g(x(2, 3), ones(3), ones(4), training=True),
    ),
    "running mean of the wrong rank": Case(
        lambda: f(x(2, 3), ones(3)[None], ones(3)),
        InputError,
        "running_mean has one value for each channel",
        "shape (1, 3)",
        "num_features=3",
    ),
    "weight of the wrong size": Case(
        lambda: train(x(2, 3), weight=ones(2)),
        InputError,
        "weight has one value for each channel, shape (3,)",
        "weight of shape (2,)",
        "num_features=3",
        lambda: g(x(2, 3), None, None, ones(2), training=True),
    ),
    "bias of the wrong size": Case(
        lambda: train(x(2, 3), bias=ones(1)),
        InputError,
        "bias has one value for each channel, shape (3,)",
        "bias of shape (1,)",
        "num_features=3",
        lambda: g(x(2, 3), None, None, None, ones(1), training=True),
    ),
    # running statistics
    "eval without running statistics": Case(
        lambda: f(x(2, 3), None, None),
        InputError,
        "with training=False the running statistics normalize",
        "None",
        "training=True",
        lambda: g(x(2, 3), None, None),
    ),
    "one running statistic of two": Case(
        lambda: f(x(2, 3), ones(3), None, training=True),
        InputError,
        "running_mean and running_var come together",
        "one of them None",
        "pass both, or neither",
    ),
    "cumulative average without a counter": Case(
        lambda: f(x(2, 3), ones(3), ones(3), training=True, momentum=None),
        InputError,
        "momentum",
        "None",
        "num_batches_tracked",
    ),
    # values
    "one value per channel": Case(
        lambda: nw.nn.BatchNorm1d(3)(x(1, 3)),
        InputError,
        "Expected more than 1 value per channel when training",
        "(1, 3)",
        "model.eval()",
        lambda: nn.BatchNorm1d(3)(x(1, 3)),
    ),
    "eps 0 in training": Case(
        lambda: nw.nn.BatchNorm1d(3, eps=0)(x(2, 3)),
        InputError,
        "eps",
        "eps=0",
        "1e-5",
        lambda: nn.BatchNorm1d(3, eps=0)(x(2, 3)),
    ),
    "eps negative in training": Case(
        lambda: nw.nn.BatchNorm1d(3, eps=-1e-5)(x(2, 3)),
        InputError,
        "eps",
        "eps=-1e-05",
        "1e-5",
        lambda: nn.BatchNorm1d(3, eps=-1e-5)(x(2, 3)),
    ),
    "eps negative in eval": Case(
        lambda: nw.nn.BatchNorm1d(3, eps=-1.0).eval()(x(2, 3)),
        InputError,
        "eps",
        "eps=-1.0",
        "1e-5",
    ),
    "eps NaN": Case(
        lambda: nw.nn.BatchNorm1d(3, eps=float("nan"))(x(2, 3)),
        InputError,
        "eps",
        "eps=nan",
        "1e-5",
    ),
    # dtypes
    "integer input": Case(
        lambda: nw.nn.BatchNorm1d(3)(x(2, 3).long()),
        DtypeError,
        "float64, float32, bfloat16 or float16",
        "torch.int64",
        "x.float()",
        lambda: nn.BatchNorm1d(3)(x(2, 3).long()),
    ),
    "boolean input": Case(
        lambda: nw.nn.BatchNorm1d(3)(x(2, 3).bool()),
        DtypeError,
        "float64, float32, bfloat16 or float16",
        "torch.bool",
        "x.float()",
        lambda: nn.BatchNorm1d(3)(x(2, 3).bool()),
    ),
    "complex input": Case(
        lambda: nw.nn.BatchNorm1d(3)(x(2, 3).to(torch.complex64)),
        DtypeError,
        "float64, float32, bfloat16 or float16",
        "torch.complex64",
        "x.float()",
    ),
    "integer residual": Case(
        lambda: nw.nn.BatchNorm1d(3)(x(2, 3), residual=x(2, 3).long()),
        DtypeError,
        "residual is a floating tensor",
        "torch.int64",
        "residual.to(x.dtype)",
    ),
    "mask of numbers": Case(
        lambda: nw.nn.BatchNorm1d(3)(x(2, 3), mask=x(2, 1)),
        DtypeError,
        "mask is boolean",
        "torch.float32",
        "mask.bool()",
    ),
    # residual and mask
    "residual of another shape": Case(
        lambda: nw.nn.BatchNorm2d(3)(x(2, 3, 4, 4), residual=x(2, 3, 2, 2)),
        InputError,
        "residual has the shape of the input",
        "residual (2, 3, 2, 2), input (2, 3, 4, 4)",
        "expand_as",
    ),
    "residual that would broadcast": Case(
        lambda: nw.nn.BatchNorm2d(3)(x(2, 3, 4, 4), residual=x(2, 3, 1, 1)),
        InputError,
        "residual has the shape of the input",
        "residual (2, 3, 1, 1)",
        "expand_as",
    ),
    "mask of another rank": Case(
        lambda: nw.nn.BatchNorm1d(3)(x(2, 3, 4), mask=x(2, 4).bool()),
        InputError,
        "mask broadcasts over all axes but the channel's",
        "mask (2, 4), input (2, 3, 4)",
        "(2, 1, 4)",
    ),
    "mask with a channel axis": Case(
        lambda: nw.nn.BatchNorm1d(3)(x(2, 3, 4), mask=x(2, 3, 4).bool()),
        InputError,
        "mask broadcasts over all axes but the channel's",
        "mask (2, 3, 4)",
        "(2, 1, 4)",
    ),
    "mask of another length": Case(
        lambda: nw.nn.BatchNorm1d(3)(x(2, 3, 4), mask=x(2, 1, 5).bool()),
        InputError,
        "mask broadcasts over all axes but the channel's",
        "mask (2, 1, 5)",
        "(2, 1, 4)",
    ),
    # options
    "unknown activation in a layer": Case(
        lambda: nw.nn.BatchNorm1d(3, activation="swish"),
        InputError,
        "activation names a function that the norm can carry",
        "'swish'",
        "'silu'",
    ),
    "unknown activation in the function": Case(
        lambda: train(x(2, 3), activation="ReLU"),
        InputError,
        "activation names a function that the norm can carry",
        "'ReLU'",
        "'relu'",
    ),
    "unknown activation in eval": Case(
        lambda: f(x(2, 3), ones(3), ones(3), activation="relu7"),
        InputError,
        "activation names a function that the norm can carry",
        "'relu7'",
        "'relu6'",
    ),
    "a slope that is no number": Case(
        lambda: nw.nn.BatchNorm1d(3, activation="leaky_relu(x)"),
        InputError,
        "activation names a function",
        "'leaky_relu(x)'",
        "'leaky_relu(0.2)'",
    ),
    "a slope that is not finite": Case(
        lambda: nw.nn.BatchNorm1d(3, activation="leaky_relu(inf)"),
        InputError,
        "activation names a function",
        "'leaky_relu(inf)'",
        "'leaky_relu(0.2)'",
    ),
    "unknown policy in a layer": Case(
        lambda: nw.nn.BatchNorm1d(3, nonfinite="ignore"),
        InputError,
        "nonfinite names a policy",
        "'ignore'",
        "one of ('propagate', 'skip', 'raise')",
    ),
    "unknown policy in the function": Case(
        lambda: train(x(2, 3), nonfinite="ignore"),
        InputError,
        "nonfinite names a policy",
        "'ignore'",
        "one of ('propagate', 'skip', 'raise')",
    ),
    # the pure form has the same checks
    "update: unknown policy": Case(
        lambda: nw.functional.batch_norm_update(x(2, 3), ones(3), ones(3), nonfinite="ignore"),
        InputError,
        "nonfinite names a policy",
        "'ignore'",
        "one of ('propagate', 'skip', 'raise')",
    ),
    "update: unknown activation": Case(
        lambda: nw.functional.batch_norm_update(x(2, 3), ones(3), ones(3), activation="swish"),
        InputError,
        "activation names a function",
        "'swish'",
        "'silu'",
    ),
    "update: wrong size": Case(
        lambda: nw.functional.batch_norm_update(x(2, 3), ones(3), ones(4)),
        InputError,
        "running_var has one value for each channel",
        "shape (4,)",
        "num_features=3",
    ),
    "update: a batch that is not finite": Case(
        lambda: nw.functional.batch_norm_update(
            x(2, 3) * torch.inf, ones(3), ones(3), nonfinite="raise"
        ),
        NonFiniteError,
        "the batch statistics are finite",
        "inf or NaN in 3 of 3 channels: 0, 1, 2",
        "nonfinite='skip'",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_message_and_type(backend: str, case: Case) -> None:
    with pytest.raises(case.error) as caught:
        case.call()
    text = str(caught.value)
    parts = (case.invariant, "; got ", case.got, ". Try: ", case.hint)
    assert re.search(".*".join(map(re.escape, parts)), text), text


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.peer], ids=[n for n, c in CASES.items() if c.peer]
)
def test_type_is_that_of_torch_nn(case: Case) -> None:
    assert case.peer is not None
    with pytest.raises(Exception) as theirs:
        case.peer()
    with pytest.raises(NormwiseError) as ours:
        case.call()
    assert isinstance(ours.value, theirs.type)


@pytest.mark.parametrize(
    "bad", [(x(2, 4),), (x(1, 3),), (x(2, 3).long(),), (x(2, 3, 4, 4),), (x(2, 3), x(3, 3))]
)
def test_a_refused_call_changes_nothing(bad: tuple[Tensor, ...]) -> None:
    layer = nw.nn.BatchNorm1d(3)
    before = {name: b.clone() for name, b in layer.named_buffers()}
    with pytest.raises(NormwiseError):
        layer(*bad)
    assert all(torch.equal(b, before[name]) for name, b in layer.named_buffers())


def test_one_form_for_all_messages() -> None:
    assert message("a is b", "a = 1", "a = b") == "a is b; got a = 1. Try: a = b."


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (InputError, (ValueError, RuntimeError)),
        (DtypeError, (TypeError, RuntimeError)),
        (NonFiniteError, (ArithmeticError, RuntimeError)),
    ],
)
def test_errors_are_the_built_in_ones_too(
    error: type[Exception], bases: tuple[type[Exception], ...]
) -> None:
    assert all(issubclass(error, base) for base in (NormwiseError, *bases))


def test_eps_0_is_allowed_in_eval() -> None:
    layer = nw.nn.BatchNorm1d(3, eps=0).eval()
    assert torch.equal(layer(x(2, 3)), x(2, 3))
