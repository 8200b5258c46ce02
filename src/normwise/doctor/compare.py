"""How far two sets of statistics of one layer are apart, in what it does to the output."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from normwise.moments import Moments

__all__ = ["Shift", "noise", "shift"]


class Shift(NamedTuple):
    """By channel, float64. gap: (mean − running_mean) / sqrt(running_var + eps). ratio: of the
    standard deviations. effect: root mean square of the change of the normalized value, which is
    of size 1: sqrt(gap² + (ratio − 1)²)."""

    gap: Tensor
    ratio: Tensor
    effect: Tensor

    @property
    def overall(self) -> float:
        """Root mean square of the effect over the channels."""
        return float(self.effect.square().mean().sqrt())

    @property
    def worst(self) -> int:
        """The channel with the largest effect."""
        return int(self.effect.argmax())


def shift(seen: Moments, mean: Tensor, var: Tensor, eps: float) -> Shift:
    """What normalizing values with the moments ``seen`` by ``mean`` and ``var`` changes.

    With x = m + s z and z of mean 0 and variance 1, the normalized value is
    (m − mean)/r + z s/r for r = sqrt(var + eps), where its own statistics give z.
    """
    scale = (var.clamp(min=0) + eps).sqrt()
    gap = (seen.mean - mean) / scale
    ratio = (seen.variance().clamp(min=0) + eps).sqrt() / scale
    return Shift(gap, ratio, torch.sqrt(gap.square() + (ratio - 1).square()))


def noise(samples: int) -> float:
    """The effect that ``samples`` independent values alone have on average: the mean of n values
    is off by 1/sqrt(n) standard deviations, their standard deviation by 1/sqrt(2n)."""
    return math.sqrt(1.5 / max(samples, 1))
