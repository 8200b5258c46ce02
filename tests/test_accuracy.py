"""Error against the oracle: never above torch.nn's on the same input, and small by itself.

An error counts as no worse when its root mean square is at most torch.nn's, or within two roundings
of the terms that the result is made of, below which the order of a sum decides.
"""

from __future__ import annotations

import zlib
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest
import torch
from cases import array, compute_rounding, lay_out
from oracle import Array, BatchNorm, moments, update_running
from torch import Tensor, nn

import normwise as nw

MOMENTUM = 0.1
# What a channel holds: (mean, standard deviation).
DATA = {
    "mean 0": (0.0, 1.0),
    "mean 3": (3.0, 1.0),
    "mean 1e4": (1e4, 1.0),
    "mean -1e4": (-1e4, 1.0),
    "mean 1e6": (1e6, 1.0),
    "mean 1e6, std 1000": (1e6, 1e3),
    "std 0.01": (0.0, 1e-2),
    "mean 1000, std 0.1": (1e3, 1e-1),
    "std 1e15": (0.0, 1e15),
    "std 1e18": (0.0, 1e18),
    "mean 1e19, std 1e18": (1e19, 1e18),
    "std 1e-18": (0.0, 1e-18),
    "constant 3.1": (3.1, 0.0),
    "constant -1e6": (-1e6, 0.0),
    "constant 1.7e18": (1.7e18, 0.0),
}
SHAPES = [(64, 6), (8, 6, 7, 7), (4, 3, 32, 33)]


class Measured:
    """The results of one training step and one of eval mode, each with its exact value."""

    def __init__(self, shape: tuple[int, ...], layout: str, data: str, dtype: torch.dtype) -> None:
        torch.manual_seed(zlib.crc32(f"{shape} {layout} {data} {dtype}".encode()))
        mean, std = DATA[data]
        x = torch.randn(shape, dtype=torch.float64) * std + mean
        self.x = lay_out(x.to(dtype), layout)
        self.dy = lay_out(torch.randn(shape, dtype=torch.float64).to(dtype), layout)
        own = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight, self.bias = torch.randn(2, shape[1], dtype=own)
        self.unit = compute_rounding(dtype)

    def of(self, module: Any) -> dict[str, Tensor]:
        rank, channels = self.x.dim(), self.x.shape[1]
        layer = (module.BatchNorm1d if rank == 2 else module.BatchNorm2d)(
            channels, momentum=MOMENTUM, dtype=self.weight.dtype
        )
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            layer.bias.copy_(self.bias)
        x = self.x.detach().clone().requires_grad_()
        y = layer(x)
        y.backward(self.dy)
        return {
            "y": y.detach(),
            "running_mean": layer.running_mean,
            "running_var": layer.running_var,
            "dx": x.grad,
            "dweight": layer.weight.grad,
            "dbias": layer.bias.grad,
        }

    @cached_property
    def theirs(self) -> dict[str, Tensor]:
        return self.of(nn)

    @cached_property
    def exactly(self) -> dict[str, tuple[Array, Array]]:
        """Each result, and the size of the terms that it is made of."""
        x, dy = array(self.x), array(self.dy)
        call = BatchNorm(x, array(self.weight), array(self.bias))
        gradients, batch = call.gradients(dy), moments(x)
        channels = x.shape[1]
        mean, var, _ = update_running(np.zeros(channels), np.ones(channels), 0, batch, MOMENTUM)
        xhat, rstd, gamma = call.normalized
        others = tuple(d for d in range(x.ndim) if d != 1)
        z = np.abs(xhat * gamma) + np.abs(call.before_activation)
        return {
            "y": (call.forward(), z),
            "running_mean": (mean, MOMENTUM * (np.abs(batch.mean) + np.sqrt(batch.var))),
            "running_var": (var, var),
            "dx": (gradients.dx, (np.abs(dy) * (1 + xhat**2) + 1) * np.abs(rstd * gamma)),
            "dweight": (gradients.dweight, np.abs(dy * (np.abs(xhat) + 1)).sum(others)),
            "dbias": (gradients.dbias, np.abs(dy).sum(others)),
        }


measured_once = cache(Measured)


def root_mean_square(values: Array) -> float:
    # Scaled first: squares of 1e-200 vanish.
    largest = np.abs(values).max(initial=0)
    if not np.isfinite(largest):
        return float("inf")
    return float(largest * np.sqrt(np.mean((values / largest) ** 2))) if largest else 0.0


def assert_no_worse(measured: Measured, factor: float) -> None:
    ours = measured.of(nw.nn)
    for name, (exact, terms) in measured.exactly.items():
        mine = root_mean_square(array(ours[name]) - exact)
        other = root_mean_square(array(measured.theirs[name]) - exact)
        floor = 2 * measured.unit * root_mean_square(terms)
        assert np.isfinite(mine)
        assert mine <= max(floor, factor * other), (
            f"{name}: root mean square error {mine:.3g}, torch.nn's {other:.3g}, floor {floor:.3g}"
        )


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_torch_nn(
    backend: str, shape: tuple[int, ...], layout: str, data: str
) -> None:
    measured = measured_once(shape, layout, data, torch.float32)
    assert_no_worse(measured, 1.0)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_value_is_within_a_few_roundings(
    backend: str, shape: tuple[int, ...], layout: str, data: str
) -> None:
    """Where torch.nn is off by 0.6 (mean 1e6 in channels_last) as much as where data are easy."""
    measured = measured_once(shape, layout, data, torch.float32)
    ours = measured.of(nw.nn)
    for name, (exact, terms) in measured.exactly.items():
        others = tuple(d for d in range(terms.ndim) if d != 1) if terms.ndim > 1 else ()
        scale = np.maximum(terms, terms.mean(axis=others, keepdims=True)) if others else terms
        error = np.abs(array(ours[name]) - exact)
        assert (error <= 4 * measured.unit * scale).all(), (
            f"{name}: {np.nanmax(error / (measured.unit * scale + 1e-300)):.3g} roundings"
        )


@pytest.mark.parametrize("data", ["mean 0", "mean 1e4", "mean 1e6", "std 1e18", "constant 3.1"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_no_worse_than_torch_nn(
    backend: str, dtype: torch.dtype, layout: str, data: str
) -> None:
    if dtype == torch.float16 and max(map(abs, DATA[data])) > 6e4:
        data = "mean 3"  # beyond float16's largest number
    measured = measured_once((8, 6, 7, 7), layout, data, dtype)
    # 1.01: both round once to 8 or 11 bits, and a few values fall to the other side.
    assert_no_worse(measured, 1.01)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [1e3, 1e4, 1e6])
def test_shifted_data_give_what_unshifted_data_give(
    backend: str, layout: str, offset: float
) -> None:
    """Integers, so that the shift itself is exact: not one bit may come from the offset."""
    x = lay_out(torch.randint(-9, 10, (8, 6, 7, 7)).float(), layout)
    layer = nw.nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    assert torch.allclose(layer(x + offset), layer(x), rtol=0, atol=3e-7)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_running_variance_far_from_zero(backend: str, layout: str) -> None:
    """Mean 1000 and variance 0.01: sums of squares in float32 return anything, even below 0."""
    x = lay_out(torch.randn(16, 4, 20, 20, dtype=torch.float64) * 0.1 + 1000, layout).float()
    layer = nw.nn.BatchNorm2d(4, momentum=1.0)
    layer(x)
    expected = x.double().movedim(1, 0).flatten(1).var(1)
    assert torch.allclose(layer.running_var.double(), expected, rtol=1e-6, atol=0)
