from __future__ import annotations

import torch
from torch import Tensor, nn

from doctor import Case, Cases, norm

X = torch.ones(4, 8)


def bn() -> nn.Module:
    return norm(8, nn.BatchNorm1d)


class Dense(nn.Module):
    """DenseNet with a drop rate: dropout, a concatenation, the next layer's norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.drop = nn.Dropout(0.2)
        self.bn = norm(12, nn.BatchNorm1d)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat([x, self.drop(self.fc(x))], 1))


FIRES: Cases = {
    "right after": lambda: Case(
        nn.Sequential(nn.Dropout(0.5), bn()),
        {"example_inputs": X},
        {("1", "warning")},
        {"p": 0.5, "second_moment_ratio": 2.0, "before": "0"},
    ),
    "of channels, and flattened": lambda: Case(
        nn.Sequential(nn.Dropout2d(0.2), nn.Flatten(), bn()),
        {"example_inputs": torch.ones(4, 2, 2, 2)},
        {("2", "warning")},
        {"p": 0.2, "second_moment_ratio": 1.25},
    ),
    "concatenated": lambda: Case(
        Dense(), {"example_inputs": X}, {("bn", "warning")}, {"p": 0.2, "before": "drop"}
    ),
}
QUIET: Cases = {
    "after the norm": lambda: Case(
        nn.Sequential(bn(), nn.Dropout(0.5), nn.Linear(8, 8)), {"example_inputs": X}
    ),
    "never drops": lambda: Case(nn.Sequential(nn.Dropout(0.0), bn()), {"example_inputs": X}),
    "keeps the variance": lambda: Case(
        nn.Sequential(nn.AlphaDropout(0.5), bn()), {"example_inputs": X}
    ),
    "no running statistics": lambda: Case(
        nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(8, track_running_stats=False)),
        {"example_inputs": X},
    ),
}


def digits(model: nn.Module, data: object) -> Case:
    model.conv2 = nn.Sequential(model.conv2, nn.Dropout(0.5))
    return Case(
        model,
        {"example_inputs": torch.ones(2, 1, 8, 8)},
        {("bn2", "warning")},
        {"before": "conv2.1", "p": 0.5},
    )
