from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doctor import Case, Cases


def standard(*shape: int) -> torch.Tensor:
    """Random values, each channel with mean 0 and standard deviation 1 exactly."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean((0, 2, 3), keepdim=True)
    return (x / x.square().mean((0, 2, 3), keepdim=True).sqrt()).float()


def remembering(mean: float, std: float, **attributes: Any) -> nn.Module:
    """A norm whose statistics are those of values with this mean and standard deviation."""
    bn = nn.BatchNorm2d(3, **attributes)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    bn.running_mean.fill_(mean)
    bn.running_var.fill_(std**2)
    return bn


def trained(bn: nn.Module) -> nn.Module:
    bn.weight.data.mul_(1.5)
    return bn


X = standard(200, 3, 6, 6)

FIRES: Cases = {
    # The effect of a gap of 1 and a ratio of 1/2: sqrt(1 + 1/4).
    "another domain": lambda: Case(
        nn.Sequential(remembering(2.0, 2.0)),
        {"data": X},
        {("0", "warning")},
        {"effect": 1.118, "gap": 1.0, "samples": 200},
    ),
    "far off": lambda: Case(
        nn.Sequential(remembering(5.0, 1.0)), {"data": X}, {("0", "error")}, {"gap": 5.0}
    ),
    "in the middle of a network": lambda: Case(
        nn.Sequential(remembering(0.0, 1.0), nn.Conv2d(3, 3, 1), remembering(0.0, 10.0)),
        {"data": X},
        {("2", "warning")},
        {"worst_channel": 2},
    ),
    "the constructor's": lambda: Case(
        nn.Sequential(remembering(0.0, 1.0)),
        {"data": 3 * X + 4},
        {("0", "info")},
        {"gap": 4.0},
    ),
}
QUIET: Cases = {
    "those of the data": lambda: Case(
        nn.Sequential(trained(remembering(2.0, 3.0))), {"data": 3 * X + 2}
    ),
    "few samples": lambda: Case(nn.Sequential(remembering(0.5, 1.0)), {"data": X[:4]}),
    "none kept": lambda: Case(
        nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), {"data": X + 9}
    ),
}


def digits(model: nn.Module, data: Any) -> Case:
    # An evaluation on dark images in training mode: the first norm forgets the data. Those behind
    # it see values that the first has normalized by the batch, as before.
    model.train()
    for x, _ in data:
        model(0.1 * x)
    return Case(
        model.eval(),
        {"data": data, "batches": 22},
        {("bn1", "error")},
        {"samples": 1408},
    )
