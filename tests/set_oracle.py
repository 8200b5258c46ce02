"""Layer, group, instance and RMS norm in float64 NumPy, from the papers' formulas.

Shares no code with the package. Sets are the rows of ``(N, G, P, L)``, see `SetNorm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from oracle import ACTIVATIONS, Array, Gradients, Mask


@dataclass
class SetNorm:
    """One call on ``x`` (N, G, P, L): N * G sets of P * L values, weights of shape (G, P)."""

    x: Array
    weight: Array | None = None
    bias: Array | None = None
    residual: Array | None = None
    mask: Mask | None = None
    eps: float = 1e-5
    activation: str = "none"
    centred: bool = True

    @cached_property
    def kept(self) -> Mask:
        mask = np.ones(1, bool) if self.mask is None else self.mask
        return np.broadcast_to(mask, self.x.shape)

    def average(self, values: Array) -> Array:
        """Over each set, kept as axes of size 1."""
        total = np.where(self.kept, values, 0).sum((2, 3), keepdims=True)
        averaged: Array = total / np.maximum(self.kept.sum((2, 3), keepdims=True), 1)
        return averaged

    @cached_property
    def statistics(self) -> tuple[Array, Array]:
        """(mean, biased variance), or (0, mean square)."""
        mean = self.average(self.x)
        mean = mean + self.average(self.x - mean)  # what the rounding of a large sum lost
        if not self.centred:
            mean = np.zeros_like(mean)
        return mean, self.average((self.x - mean) ** 2)

    @cached_property
    def normalized(self) -> tuple[Array, Array]:
        mean, var = self.statistics
        rstd = 1 / np.sqrt(var + self.eps)
        return (self.x - mean) * rstd, rstd

    def spread(self, v: Array | None, absent: float) -> Array:
        _, g, p, _ = self.x.shape
        return np.full((g, p, 1), absent) if v is None else v.reshape(g, p, 1)

    @cached_property
    def before_activation(self) -> Array:
        z = self.normalized[0] * self.spread(self.weight, 1.0) + self.spread(self.bias, 0.0)
        return z if self.residual is None else z + self.residual

    def forward(self) -> Array:
        y: Array = np.where(self.kept, ACTIVATIONS[self.activation][0](self.before_activation), 0)
        return y

    def gradients(self, dy: Array) -> Gradients:
        xhat, rstd = self.normalized
        xhat = np.where(self.kept, xhat, 0)
        slope = ACTIVATIONS[self.activation][1](self.before_activation)
        dz = np.where(self.kept, dy * slope, 0)
        dxhat = dz * self.spread(self.weight, 1.0)
        dx = dxhat - xhat * self.average(dxhat * xhat)
        if self.centred:
            dx = dx - self.average(dxhat)
        dx = np.where(self.kept, dx * rstd, 0)
        return Gradients(dx, (dz * xhat).sum((0, 3)).reshape(-1), dz.sum((0, 3)).reshape(-1), dz)
