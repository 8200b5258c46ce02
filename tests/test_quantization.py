"""Simulated int8 against float64 NumPy written from the formulas; equalize() against its model."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import normwise as nw
from examples.quantization_order import main as example
from normwise.errors import InputError
from normwise.tools.quantization import fake_weight, simulate_int8

Array = NDArray[np.float64]


# The oracle


def symmetric(w: Array, axes: tuple[int, ...] | None) -> Array:
    """Round to the grid -127 … 127 of one scale for all elements that ``axes`` run over."""
    scale = np.abs(w).max(axis=axes, keepdims=True) / 127
    scale[scale == 0] = 1
    return np.rint(w / scale) * scale


def affine(x: Array) -> Array:
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def decibels(wanted: Array, got: Array) -> float:
    return float(10 * np.log10((wanted**2).sum() / ((wanted - got) ** 2).sum()))


def array(t: Tensor) -> Array:
    return t.detach().double().numpy()


# Weights on the grid


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_weights_per_tensor_and_per_channel(scale: float) -> None:
    layer = nn.Linear(7, 5).double()
    layer.weight.data.mul_(scale)
    w = array(layer.weight)
    np.testing.assert_allclose(array(fake_weight(layer, False)), symmetric(w, None), rtol=1e-12)
    np.testing.assert_allclose(array(fake_weight(layer, True)), symmetric(w, (1,)), rtol=1e-12)


def test_channels_of_a_grouped_transposed_convolution() -> None:
    """Weight (inputs, outputs / groups, k): output 3 g + o lies at [2 g : 2 g + 2, o]."""
    layer = nn.ConvTranspose1d(4, 6, 3, groups=2).double()
    w = array(layer.weight)
    expected = np.empty_like(w)
    for g in range(2):
        for o in range(3):
            part = w[2 * g : 2 * g + 2, o]
            expected[2 * g : 2 * g + 2, o] = symmetric(part, None)
    np.testing.assert_allclose(array(fake_weight(layer, True)), expected, rtol=1e-12)


def test_weights_of_zeros_stay() -> None:
    layer = nn.Conv2d(2, 3, 1)
    nn.init.zeros_(layer.weight[1])
    assert torch.equal(fake_weight(layer, True)[1], torch.zeros(2, 1, 1))
    nn.init.zeros_(layer.weight)
    assert torch.equal(fake_weight(layer, False), layer.weight)


# The simulated model


@pytest.mark.parametrize("offset", [0.0, 3.0, -3.0, 1e6])
def test_a_linear_layer_in_int8(offset: float) -> None:
    layer = nn.Linear(6, 4).double()
    x = torch.randn(32, 6, dtype=torch.float64) + offset
    w, bias = array(layer.weight), array(layer.bias)
    for per_channel, axes in ((False, None), (True, (1,))):
        got = array(simulate_int8(layer, x, per_channel=per_channel)(x))
        expected = affine(array(x)) @ symmetric(w, axes).T + bias
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * (1 + abs(offset)))


def test_values_outside_the_calibration_saturate() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    made = simulate_int8(layer, torch.tensor([[-1.0], [1.0]]))
    wide = made(torch.tensor([[-50.0], [50.0]])).flatten()
    torch.testing.assert_close(wide, torch.tensor([-1.0, 1.0]), rtol=0, atol=2 / 255)


def test_the_model_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 9, 2))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(4, 1, 5, 5)
    simulate_int8(net, x)
    nw.quantization_report(net, x)
    nw.equalize(net, x)
    assert net.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# The report


def test_ratios_are_those_of_the_oracle() -> None:
    layer = nn.Linear(6, 4).double()
    x = torch.randn(50, 6, dtype=torch.float64)
    facts = nw.quantization_report(nn.Sequential(layer), x)["0"].facts
    w, bias, inputs = array(layer.weight), array(layer.bias), array(x)
    wanted = inputs @ w.T + bias
    for name, axes in (("tensor", None), ("channel", (1,))):
        got = affine(inputs) @ symmetric(w, axes).T + bias
        assert facts[f"snr_{name}"] == pytest.approx(decibels(wanted, got), abs=1e-6)
        worst = min(decibels(wanted[:, c], got[:, c]) for c in range(4))
        assert facts[f"worst_{name}"] == pytest.approx(worst, abs=1e-6)


def test_a_layer_called_twice_is_measured_over_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=self.layer(x))

    net = Twice()
    x = torch.randn(20, 3, dtype=torch.float64)
    w, bias = array(net.layer.weight), array(net.layer.bias)
    first = array(x)
    second = first @ w.T + bias
    both = np.concatenate([first, second])
    got = affine(both) @ symmetric(w, None).T + bias
    facts = nw.quantization_report(net, x)["layer"].facts
    assert facts["snr_tensor"] == pytest.approx(decibels(both @ w.T + bias, got), abs=1e-6)


def test_the_ratio_of_the_whole_is_that_of_the_simulated_model() -> None:
    net = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    x = torch.randn(30, 5, dtype=torch.float64)
    report = nw.quantization_report(net, x)
    expected = decibels(array(net(x)), array(simulate_int8(net, x, per_channel=True)(x)))
    assert report.facts["snr_channel"] == pytest.approx(expected, abs=1e-9)
    assert "per channel" in str(report)


def scaled_norm(channels: int, **scales: float) -> nn.BatchNorm2d:
    """In eval y = a x with a = 1, and of channel n what the argument cn says."""
    norm = nn.BatchNorm2d(channels, eps=0.0)
    for name, a in scales.items():
        norm.weight.data[int(name[1:])] = a
    return norm


def test_the_channels_that_widen_a_range_going_up() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), scaled_norm(8, c2=-20.0, c5=9.0), nn.ReLU()).eval()
    x = torch.randn(2, 3, 7, 7)
    entry = nw.quantization_report(nw.fold(net, x, seconds=0).model, x, original=net)["0"]
    assert entry.action == "widened"
    assert entry.facts["why"] == "output channels 2 (|a| = 20), 5 (|a| = 9); median 1"
    w = array(net[0].weight)
    folded = w * np.array([1, 1, -20, 1, 1, 9, 1, 1]).reshape(-1, 1, 1, 1)
    peaks = [float(np.abs(v).max() / np.sqrt((v**2).mean())) for v in (w, folded)]
    assert entry.facts["peak"] == pytest.approx(peaks, rel=1e-6)
    assert entry.facts["worst_channel"] > entry.facts["worst_tensor"] + 10


def test_the_channels_that_widen_a_range_going_down() -> None:
    """A norm that went down multiplies input channels, which share a scale also per channel."""
    net = nn.Sequential(nn.Sigmoid(), scaled_norm(6, c4=30.0), nn.Conv2d(6, 5, 3)).eval()
    x = torch.randn(2, 6, 7, 7)
    entry = nw.quantization_report(nw.fold(net, x, seconds=0).model, x, original=net)["2"]
    assert entry.action == "widened"
    assert entry.facts["why"] == "input channels 4 (|a| = 30); median 1"


def test_many_far_channels_are_counted_and_none_is_kept() -> None:
    x = torch.randn(2, 3, 5, 5)
    far = {f"c{i}": 40.0 for i in range(6)}
    for norm, action, says in (
        (scaled_norm(16, **far), "widened", "and 2 more; median 1"),
        (scaled_norm(16), "kept", None),
    ):
        net = nn.Sequential(nn.Conv2d(3, 16, 1), norm).eval()
        entry = nw.quantization_report(nw.fold(net, x, seconds=0).model, x, original=net)["0"]
        assert entry.action == action
        assert entry.facts["why"] is None if says is None else says in entry.facts["why"]


def test_zero_weights_and_silent_layers_give_no_error() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    for p in net.parameters():
        nn.init.zeros_(p)
    report = nw.quantization_report(net, torch.zeros(5, 3, dtype=torch.float64), original=net)
    assert [e.action for e in report] == ["kept", "kept"]
    assert all(math.isnan(e.facts["snr_tensor"]) for e in report)


# Errors


@pytest.mark.parametrize("tool", [simulate_int8, nw.quantization_report, nw.equalize])
def test_models_without_layers_and_wrong_inputs(tool: Any) -> None:
    with pytest.raises(InputError, match="without one"):
        tool(nn.ReLU(), torch.randn(2, 3))
    with pytest.raises(InputError, match="must run on the example inputs"):
        tool(nn.Linear(3, 2), torch.randn(2, 4))


# Equalisation


def wide(conv: nn.Module, axis: int = 0) -> nn.Module:
    """With output channels of ranges that differ by orders of magnitude."""
    n = conv.weight.shape[axis]
    shape = [1] * conv.weight.dim()
    shape[axis] = -1
    conv.weight.data *= torch.logspace(-2, 2, n, dtype=conv.weight.dtype).view(shape)
    return conv


def check_same(net: nn.Module, level: nn.Module, x: Tensor) -> None:
    """To the last digits in float64, and to rounding in float32."""
    net = net.eval()
    torch.testing.assert_close(level(x), net(x), rtol=1e-4, atol=1e-4 * net(x).abs().max().item())


def test_one_pair_against_the_formula() -> None:
    net = nn.Sequential(wide(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.randn(16, 5, dtype=torch.float64)
    level, report = nw.equalize(net, x)
    w1, w2 = array(net[0].weight), array(net[2].weight)
    r1, r2 = np.abs(w1).max(1), np.abs(w2).max(0)
    s = np.sqrt(r1 * r2) / r2
    np.testing.assert_allclose(array(level[0].weight), w1 / s[:, None], rtol=1e-12)
    np.testing.assert_allclose(array(level[0].bias), array(net[0].bias) / s, rtol=1e-12)
    np.testing.assert_allclose(array(level[2].weight), w2 * s, rtol=1e-12)
    torch.testing.assert_close(level(x), net(x), rtol=1e-12, atol=1e-12)
    assert report["0"].into == "2"
    assert report["0"].facts["error64"] < 1e-12
    assert report["0"].facts["spread"][1] < report["0"].facts["spread"][0]


def test_a_chain_with_everything_that_lets_a_scale_pass() -> None:
    net = nn.Sequential(
        wide(nn.Conv2d(3, 8, 3)), nn.LeakyReLU(0.1), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(inplace=True), nn.Dropout(),
        nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 3, 5),
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    level, report = nw.equalize(net, x)
    assert [(e.name, e.into) for e in report if e.action == "equalized"] == [
        ("0", "3"), ("3", "6"), ("6", "9"), ("9", "12"),
    ]  # fmt: skip
    assert report["12"].reason == "is-output"
    assert report.facts["error64"] < 1e-12
    check_same(net, level, x)
    outputs = level[0].weight.detach().abs().amax((1, 2, 3))
    inputs = level[3].weight.detach().abs().amax((1, 2, 3))
    torch.testing.assert_close(outputs, inputs, rtol=1e-2, atol=0)


def test_int8_recovers() -> None:
    net = nn.Sequential(wide(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    net[2].weight.data /= torch.logspace(-2, 2, 16).view(1, -1, 1, 1)
    x = torch.randn(4, 3, 9, 9)
    before = nw.quantization_report(net, x).facts["snr_tensor"]
    after = nw.quantization_report(nw.equalize(net, x).model, x).facts["snr_tensor"]
    assert before < 25
    assert after > 35


def test_borders_of_a_folded_norm_are_divided_too() -> None:
    net = nn.Sequential(
        nn.Sigmoid(), nn.BatchNorm2d(3), wide(nn.Conv2d(3, 6, 3, padding=1)), nn.ReLU(),
        nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.weight, 0.2, 3)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 6, 6)
    folded = nw.fold(net.eval(), x, seconds=0).model
    assert "Border" in type(folded[2]).__name__
    assert "Border" in type(folded[5]).__name__
    level, report = nw.equalize(folded, x)
    assert [e.into for e in report] == ["5", "7", None]
    assert report.facts["error64"] < 1e-12
    check_same(net, level, torch.randn(3, 3, 8, 5))


def test_dead_channels_keep_their_weights() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.zeros_(net[0].weight[1])
    nn.init.zeros_(net[2].weight[:, 2])
    x = torch.randn(8, 3, dtype=torch.float64)
    level, _ = nw.equalize(net, x)
    assert torch.equal(level[0].bias[1:3], net[0].bias[1:3])
    torch.testing.assert_close(level(x), net(x), rtol=1e-12, atol=1e-12)


class Blocked(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.first(x)
        if self.kind == "kept":
            self.seen = [y]
        z = {
            "relu6": F.relu6, "sigmoid": torch.sigmoid, "norm": self.norm,
            "plus one": lambda t: t + 1, "residual": lambda t: t + x,
        }.get(self.kind, torch.relu)(y)  # fmt: skip
        if self.kind == "twice":
            z = self.first(z)
        if self.kind == "mixed":
            z = z.transpose(1, 2)[:, :3]
        out = self.second(z)
        return (out, y) if self.kind == "output" else out + y if self.kind == "skip" else out


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("relu6", "blocked"), ("sigmoid", "blocked"), ("norm", "blocked"), ("plus one", "blocked"),
        ("residual", "blocked"), ("skip", "used-elsewhere"), ("output", "is-output"),
        ("twice", "shared-weight"), ("mixed", "channels-differ"), ("kept", "is-output"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_left(kind: str, reason: str) -> None:
    net = Blocked(kind).eval()
    x = torch.randn(2, 3, 4, 4)
    level, report = nw.equalize(net, x)
    assert report["first"].reason == reason
    assert all(torch.equal(a, b) for a, b in zip(level.parameters(), net.parameters(), strict=True))


def test_tied_weights_and_hooks_are_left() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[4].weight = net[0].weight
    _, report = nw.equalize(net, torch.randn(2, 3))
    assert {e.action for e in report} == {"left"}
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[1].register_forward_hook(lambda module, args, output: None)
    assert nw.equalize(net, torch.randn(2, 3)).report["0"].reason == "hook"


# The example


def test_the_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    monkeypatch.setattr(sys, "argv", ["quantization_order.py", "--seeds", "1", "--epochs", "1"])
    example()
    printed = capsys.readouterr().out
    assert "conv relu bn, equalized, mean" in printed
    assert "3 widened" in printed
