from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doctor import Case, Cases, norm


def pooled(size: int) -> dict[str, Any]:
    x = torch.randn(size, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    return {"data": [x, x]}


def head() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), norm(8, nn.BatchNorm2d))


FIRES: Cases = {
    "one": lambda: Case(head(), pooled(1), {("1", "error")}, {"values": 1, "batch_size": 1}),
    "two": lambda: Case(
        head(), pooled(2), {("1", "warning")}, {"values": 2, "shape": [2, 8, 1, 1]}
    ),
    "a few": lambda: Case(head(), pooled(15), {("1", "warning")}, {"values": 15}),
}
QUIET: Cases = {
    "enough": lambda: Case(head(), pooled(16)),
    "many positions": lambda: Case(nn.Sequential(norm(8, nn.BatchNorm2d)), pooled(1)),
    "does not look at the batch": lambda: Case(nn.Sequential(nn.GroupNorm(2, 8)), pooled(1)),
}


def digits(model: nn.Module, data: Any) -> Case:
    x, _ = next(iter(data))
    return Case(model, {"data": list(x.split(2))}, {("bn3", "warning")}, {"values": 2})
