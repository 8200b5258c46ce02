from __future__ import annotations

import torch
from torch import Tensor, nn

import normwise as nw
from doctor import Case, Cases, norm


class Sequence(nn.Module):
    """The digits' rows as a sequence of 8 vectors: a linear layer over each, and a norm."""

    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x.flatten(1, 2)))


FIRES: Cases = {
    "same size": lambda: Case(
        nn.Sequential(nn.Linear(5, 8), norm(8, nn.BatchNorm1d)),
        {"example_inputs": torch.ones(4, 8, 5)},
        {("1", "warning")},
        {"shape": [4, 8, 8], "same_size": True, "before": "linear"},
    ),
    "embedding": lambda: Case(
        nn.Sequential(nn.Embedding(10, 6), norm(8, nn.BatchNorm1d)),
        {"example_inputs": torch.zeros(4, 8, dtype=torch.int64)},
        {("1", "warning")},
        {"shape": [4, 8, 6], "same_size": False},
    ),
}
QUIET: Cases = {
    "channels last, said": lambda: Case(
        nn.Sequential(nn.Linear(5, 8), norm(8, lambda n: nw.nn.BatchNorm(n, channel_dim=-1))),
        {"example_inputs": torch.ones(4, 8, 5)},
    ),
    "rank 2": lambda: Case(
        nn.Sequential(nn.Linear(5, 8), norm(8, nn.BatchNorm1d)),
        {"example_inputs": torch.ones(4, 5)},
    ),
    "convolution": lambda: Case(
        nn.Sequential(nn.Conv1d(5, 8, 3), norm(8, nn.BatchNorm1d)),
        {"example_inputs": torch.ones(4, 5, 8)},
    ),
}


def digits(model: nn.Module, data: object) -> Case:
    return Case(
        Sequence(norm(8, nn.BatchNorm1d)),
        {"example_inputs": next(iter(data))[0]},
        {("bn", "warning")},
        {"shape": [64, 8, 8]},
    )
