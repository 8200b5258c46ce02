"""Batch norm in float64 NumPy, written from the formulas. Shares no code with the package.

Ioffe & Szegedy 2015, algorithm 1, with what normwise adds: any channel axis, a mask, a residual,
an activation. The gradients are the analytic ones; test_oracle.py holds them against differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(z: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * z))


def _gelu(z: Array) -> Array:
    return 0.5 * z * (1 + _erf(z / math.sqrt(2)))


def _gelu_slope(z: Array) -> Array:
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + _erf(z / math.sqrt(2))) + z * density


def _silu_slope(z: Array) -> Array:
    s = _sigmoid(z)
    return s + z * s * (1 - s)


# name: (value, slope, the points where the slope jumps)
Function = Callable[[Array], Array]
ACTIVATIONS: dict[str, tuple[Function, Function, tuple[float, ...]]] = {
    "none": (lambda z: z, np.ones_like, ()),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0, (0.0,)),
    "relu6": (lambda z: np.clip(z, 0, 6), lambda z: ((z > 0) & (z < 6)) * 1.0, (0.0, 6.0)),
    "leaky_relu": (
        lambda z: np.where(z > 0, z, 0.01 * z),
        lambda z: np.where(z > 0, 1, 0.01),
        (0.0,),
    ),
    "leaky_relu(0.2)": (
        lambda z: np.where(z > 0, z, 0.2 * z),
        lambda z: np.where(z > 0, 1, 0.2),
        (0.0,),
    ),
    "leaky_relu(-0.5)": (
        lambda z: np.where(z > 0, z, -0.5 * z),
        lambda z: np.where(z > 0, 1, -0.5),
        (0.0,),
    ),
    "hardswish": (
        lambda z: z * np.clip(z + 3, 0, 6) / 6,
        lambda z: np.where(z < -3, 0, np.where(z > 3, 1, (2 * z + 3) / 6)),
        (-3.0, 3.0),
    ),
    "silu": (lambda z: z * _sigmoid(z), _silu_slope, ()),
    "gelu": (_gelu, _gelu_slope, ()),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * (1 - _sigmoid(z)), ()),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2, ()),
}


@dataclass
class Statistics:
    """Moments of each channel: ``count``, ``mean`` and ``m2``, all of shape (C,)."""

    count: Array
    mean: Array
    m2: Array

    @property
    def var(self) -> Array:
        return self.m2 / np.maximum(self.count, 1)


@dataclass
class Gradients:
    dx: Array
    dweight: Array
    dbias: Array
    dresidual: Array


def _other_axes(x: Array, axis: int) -> tuple[int, ...]:
    return tuple(d for d in range(x.ndim) if d != axis % x.ndim)


def _column(v: Array | float, x: Array, axis: int) -> Array:
    """A per-channel vector, shaped to broadcast against x."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.asarray(v, dtype=np.float64).reshape(shape)


def _kept(x: Array, mask: Mask | None) -> Mask:
    return np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)


def moments(x: Array, axis: int = 1, mask: Mask | None = None) -> Statistics:
    kept, others = _kept(x, mask), _other_axes(x, axis)
    count = kept.sum(others).astype(np.float64)
    divisor = np.maximum(count, 1)
    mean = np.where(kept, x, 0).sum(others) / divisor
    # The rounding of a sum of large values, found from the deviations and put back.
    mean = mean + np.where(kept, x - _column(mean, x, axis), 0).sum(others) / divisor
    deviation = np.where(kept, x - _column(mean, x, axis), 0)
    return Statistics(count, mean, (deviation**2).sum(others))


@dataclass
class BatchNorm:
    """One call of batch norm: ``forward()`` is y, ``gradients(dy)`` follow.

    ``statistics`` None normalizes by the batch; else they are constants, as in eval mode, given as
    (mean, var). What several results share is computed once.
    """

    x: Array
    weight: Array | None = None
    bias: Array | None = None
    residual: Array | None = None
    mask: Mask | None = None
    axis: int = 1
    eps: float = 1e-5
    activation: str = "none"
    statistics: tuple[Array, Array] | None = None

    @cached_property
    def mean_var(self) -> tuple[Array, Array]:
        if self.statistics is not None:
            return self.statistics
        m = moments(self.x, self.axis, self.mask)
        return m.mean, m.var

    @cached_property
    def normalized(self) -> tuple[Array, Array, Array]:
        """xhat, 1 / sqrt(var + eps) and gamma, the last two shaped to broadcast."""
        mean, var = self.mean_var
        rstd = _column(1 / np.sqrt(var + self.eps), self.x, self.axis)
        gamma = _column(1.0 if self.weight is None else self.weight, self.x, self.axis)
        return (self.x - _column(mean, self.x, self.axis)) * rstd, rstd, gamma

    @cached_property
    def before_activation(self) -> Array:
        """z = gamma * xhat + beta + residual; y is the activation of it."""
        xhat, _, gamma = self.normalized
        z = xhat * gamma
        if self.bias is not None:
            z = z + _column(self.bias, self.x, self.axis)
        return z if self.residual is None else z + self.residual

    def forward(self) -> Array:
        value = ACTIVATIONS[self.activation][0]
        y: Array = np.where(_kept(self.x, self.mask), value(self.before_activation), 0)
        return y

    def sums(self, dy: Array) -> Array:
        """sum(dz) and sum(dz * (x - mean)) for each channel, shape (2, C)."""
        dz, others = self.dz(dy), _other_axes(self.x, self.axis)
        xhat, rstd, _ = self.normalized
        centred = np.where(_kept(self.x, self.mask), xhat / rstd, 0)
        return np.stack([dz.sum(others), (dz * centred).sum(others)])

    def dz(self, dy: Array) -> Array:
        slope = ACTIVATIONS[self.activation][1]
        dz: Array = np.where(_kept(self.x, self.mask), dy * slope(self.before_activation), 0)
        return dz

    def gradients(self, dy: Array) -> Gradients:
        kept, others = _kept(self.x, self.mask), _other_axes(self.x, self.axis)
        xhat, rstd, gamma = self.normalized
        xhat = np.where(kept, xhat, 0)
        dz = self.dz(dy)
        dbias, dweight = dz.sum(others), (dz * xhat).sum(others)
        dxhat = dz * gamma
        if self.statistics is None:
            n = np.maximum(kept.sum(others, keepdims=True), 1)
            mean_dxhat = dxhat.sum(others, keepdims=True) / n
            mean_product = (dxhat * xhat).sum(others, keepdims=True) / n
            dxhat = dxhat - mean_dxhat - xhat * mean_product
        dx = np.where(kept, dxhat * rstd, 0)
        return Gradients(dx, dweight, dbias, dz)

    def near_kink(self, width: float) -> Mask:
        """Where rounding may put z on the other side of a jump of the activation's slope."""
        near = np.zeros(self.x.shape, bool)
        for kink in ACTIVATIONS[self.activation][2]:
            near |= np.abs(self.before_activation - kink) < width
        return near


def update_running(
    running_mean: Array,
    running_var: Array,
    tracked: int,
    batch: Statistics,
    momentum: float | None,
) -> tuple[Array, Array, int]:
    """torch.nn's policy: the unbiased variance enters; momentum None is the plain average."""
    if not (batch.count > 0).all():
        return running_mean, running_var, tracked
    tracked += 1
    factor = 1 / tracked if momentum is None else momentum
    unbiased = batch.m2 / np.maximum(batch.count - 1, 1)
    return (
        (1 - factor) * running_mean + factor * batch.mean,
        (1 - factor) * running_var + factor * unbiased,
        tracked,
    )
