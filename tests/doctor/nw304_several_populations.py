from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from doctor import Case, Cases, norm


class Siamese(nn.Module):
    """One norm over the input and over ``scale`` times the input plus ``offset``."""

    def __init__(self, inner: nn.Module, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.inner, self.scale, self.offset = inner, scale, offset

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), self.inner(self.scale * x + self.offset)


def standard(*shape: int) -> Tensor:
    """Random values, each channel with mean 0 and standard deviation 1 exactly."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean((0, 2, 3), keepdim=True)
    return (x / x.square().mean((0, 2, 3), keepdim=True).sqrt()).float()


X = standard(100, 8, 4, 4)

FIRES: Cases = {
    "shifted": lambda: Case(
        Siamese(norm(), 1.0, 2.0), {"data": X}, {("inner", "warning")}, {"calls": 2, "gap": 2.0}
    ),
    # Values of three times the size among those of one: off by 3 - 1 standard deviations.
    "scaled": lambda: Case(
        Siamese(norm(), 3.0), {"data": X}, {("inner", "warning")}, {"samples": 100}
    ),
}
QUIET: Cases = {
    "alike": lambda: Case(Siamese(norm(), -1.0), {"data": X}),
    "one call": lambda: Case(nn.Sequential(norm()), {"data": X}),
    "few samples": lambda: Case(Siamese(norm(), 1.0, 0.5), {"data": X[:4]}),
}


def digits(model: nn.Module, data: Any) -> Case:
    # Photographs and their negatives, through one encoder.
    return Case(
        Siamese(model, -1.0, 1.0),
        {"data": data},
        {("inner.bn1", "warning"), ("inner.bn3", "warning")},
        {"calls": 2},
    )
