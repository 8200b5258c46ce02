from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from doctor import Case, Cases, norm


class Divide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax((1, 2, 3), keepdim=True)


X = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(0))


def with_a_black_image() -> Tensor:
    x = X.clone()
    x[1] = 0
    return x


FIRES: Cases = {
    "zero by zero": lambda: Case(
        nn.Sequential(Divide(), norm(), nn.ReLU(), norm()),
        {"data": with_a_black_image()},
        {("1", "error")},
        {"values": 128, "dtypes": ["torch.float32"], "largest_finite": 1.0},
    ),
    "in a later batch": lambda: Case(
        nn.Sequential(Divide(), norm()),
        {"data": [X, with_a_black_image()]},
        {("1", "error")},
        {"values": 128},
    ),
}
QUIET: Cases = {
    "finite": lambda: Case(nn.Sequential(Divide(), norm()), {"data": X}),
    "large": lambda: Case(nn.Sequential(norm()), {"data": 1e30 * X}),
}


def digits(model: nn.Module, data: Any) -> Case:
    x, _ = next(iter(data))
    x = x.clone()
    x[3, 0, 2, 2] = float("nan")
    return Case(model, {"data": x}, {("bn1", "error")}, {"values": 16})
