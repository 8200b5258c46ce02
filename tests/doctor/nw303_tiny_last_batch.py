from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from doctor import Case, Cases, norm


def loader(samples: int, batch_size: int = 32, shuffle: bool = True, **kwargs: Any) -> Any:
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size, shuffle=shuffle, **kwargs)


def model() -> nn.Module:
    return nn.Sequential(norm(8, nn.BatchNorm1d))


FIRES: Cases = {
    "one sample": lambda: Case(
        model(), {"data": loader(65)}, {("0", "error")}, {"last": 1, "samples": 65, "values": 1}
    ),
    "a few": lambda: Case(
        model(), {"data": loader(71)}, {("0", "warning")}, {"last": 7, "batch_size": 32}
    ),
    "in an evaluation": lambda: Case(
        model(), {"data": loader(65, shuffle=False)}, {("0", "info")}, {"last": 1}
    ),
}
QUIET: Cases = {
    "dropped": lambda: Case(model(), {"data": loader(65, drop_last=True)}),
    "no rest": lambda: Case(model(), {"data": loader(64)}),
    "large enough a rest": lambda: Case(model(), {"data": loader(80)}),
    "no loader": lambda: Case(model(), {"data": [torch.randn(32, 8), torch.randn(1, 8)]}),
}


def digits(model: nn.Module, data: Any) -> Case:
    shuffled = DataLoader(data.dataset, 67, shuffle=True)  # 1408 = 21 · 67 + 1
    return Case(
        model,
        {"data": shuffled},
        {("bn3", "error")},
        {"last": 1, "values": 1, "samples": 1408},
    )
