"""Published worked examples, to all printed digits (tests/data/worked_examples.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import normwise as nw

EXAMPLES = json.loads((Path(__file__).parent / "data" / "worked_examples.json").read_text())


def assert_prints_as(value: Tensor, printed: Any) -> None:
    """Within half of the last printed digit, four decimals or as many as float32 has."""
    expected = torch.tensor(printed, dtype=torch.float64)
    # The published numbers were themselves rounded, from inputs that were rounded to 4 decimals.
    step = torch.maximum(torch.tensor(1e-4), expected.abs() * 2.0**-23)
    off = (value.double() - expected).abs() / step
    assert off.max() <= 0.51, f"off by {off.max():.2f} of the last printed digit"


def test_two_images_of_one_channel(backend: str) -> None:
    example = EXAMPLES["batch_norm_2d_seeded"]
    torch.manual_seed(0)
    gamma = torch.rand(1)
    x = torch.randn(example["shape"])
    layer = nw.nn.BatchNorm2d(1)
    with torch.no_grad():
        layer.weight.copy_(gamma)
    y = layer(x)
    assert_prints_as(gamma, example["gamma"])
    assert_prints_as(y.flatten(), example["y"])
    # Its fact: the mean of y is beta = 0, the standard deviation |gamma|; it is no distribution.
    assert abs(y.sum().item()) < 1e-5
    assert abs(y.std(correction=0).item() - abs(gamma.item())) < 1e-4


def test_one_step_of_batch_norm_1d(backend: str) -> None:
    example = EXAMPLES["batch_norm_1d_affine"]
    layer = nw.nn.BatchNorm1d(10)
    y = layer(torch.tensor(example["x"]))
    assert_prints_as(y, example["y"])
    assert layer.num_batches_tracked == example["num_batches_tracked"]


def test_running_mean_after_one_step(backend: str) -> None:
    example = EXAMPLES["batch_norm_1d_affine"]
    layer = nw.nn.BatchNorm1d(10)
    layer(torch.tensor(example["x"]))
    assert_prints_as(layer.running_mean, example["running_mean"])


def test_running_variance_after_one_step(backend: str) -> None:
    example = EXAMPLES["batch_norm_1d_affine"]
    x = torch.tensor(example["x"])
    layer = nw.nn.BatchNorm1d(10)
    layer(x)
    expected = torch.tensor(example["running_var"])
    # The inputs are printed to 4 decimals: half a digit of each moves the variance by this much.
    moved = 0.1 * 2 * (x - x.mean(0)).abs().sum(0) / (len(x) - 1) * 0.5e-4
    assert ((layer.running_var - expected).abs() <= moved + expected * 2.0**-23).all()


def test_without_parameters(backend: str) -> None:
    example = EXAMPLES["batch_norm_1d_plain"]
    y = nw.nn.BatchNorm1d(10, affine=False)(torch.tensor(example["x"]))
    assert_prints_as(y, example["y"])


def test_running_statistics_of_two_batches(backend: str) -> None:
    example = EXAMPLES["running_statistics_two_batches"]
    layer = nw.nn.BatchNorm2d(3)
    for after, x in (
        ("after_first", torch.randn(1, 3, 255, 255)),
        ("after_second", 2 * torch.randn(1, 3, 255, 255) + 1),
    ):
        layer(x)
        for buffer in ("running_mean", "running_var"):
            off = (getattr(layer, buffer) - example[after][buffer]).abs().max()
            assert off <= example[after]["tolerance"]


def test_the_parameters_can_undo_the_normalization(backend: str) -> None:
    x = torch.randn(8, 3, 5, 5) * 4 + 2
    layer = nw.nn.BatchNorm2d(3)
    m = nw.functional.batch_moments(x)
    with torch.no_grad():
        layer.weight.copy_((m.variance() + layer.eps).sqrt())
        layer.bias.copy_(m.mean)
    torch.testing.assert_close(layer(x), x, rtol=1e-6, atol=1e-6)


def test_axes(backend: str) -> None:
    """Dense: over N. Convolution: over N, H, W. Channel last: the axis named is the one kept."""
    for shape, channel_dim in (((16, 3), 1), ((4, 3, 5, 5), 1), ((4, 5, 5, 3), -1)):
        y = nw.nn.BatchNorm(3, channel_dim=channel_dim)(torch.randn(shape) * 3 + 1)
        m = nw.functional.batch_moments(y, channel_dim)
        assert m.mean.shape == (3,)
        assert m.mean.abs().max() < 1e-6
        assert (m.variance() - 1).abs().max() < 1e-4


def test_momentum_is_that_of_pytorch(backend: str) -> None:
    """running = (1 - momentum) * running + momentum * batch; the unbiased variance enters."""
    x = torch.tensor([[1.0], [3.0]])
    layer = nw.nn.BatchNorm1d(1, momentum=0.1)
    y = layer(x)
    torch.testing.assert_close(layer.running_mean, torch.tensor([0.2]))
    torch.testing.assert_close(layer.running_var, torch.tensor([0.9 * 1 + 0.1 * 2]))
    torch.testing.assert_close(y.flatten(), torch.tensor([-1.0, 1.0]), rtol=1e-5, atol=0)
