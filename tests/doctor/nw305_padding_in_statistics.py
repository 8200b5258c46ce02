from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import normwise as nw
from doctor import Case, Cases, norm


def padded(share: float, length: int = 40) -> Tensor:
    """Eight sequences of 8 channels whose last ``share`` is zeros."""
    x = torch.randn(8, 8, length, generator=torch.Generator().manual_seed(0))
    x[..., length - int(share * length) :] = 0
    return x


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nw.nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x, lengths=[20] * len(x))


FIRES: Cases = {
    # 20 of 40 positions are padding; the last of each run is not counted.
    "padding": lambda: Case(
        nn.Sequential(norm(8, nn.BatchNorm1d)),
        {"data": padded(0.5)},
        {("0", "warning")},
        {"share": 19 / 40},
    ),
    "behind a convolution": lambda: Case(
        nn.Sequential(nn.Conv1d(8, 8, 3), norm(8, nn.BatchNorm1d)),
        {"data": padded(0.5)},
        {("1", "warning")},
        {"share": 17 / 38},
    ),
    "channels last": lambda: Case(
        nn.Sequential(norm(8, lambda n: nw.nn.BatchNorm(n, channel_dim=-1))),
        {"data": padded(0.5).transpose(1, 2)},
        {("0", "warning")},
        {"share": 19 / 40},
    ),
}
QUIET: Cases = {
    "no padding": lambda: Case(nn.Sequential(norm(8, nn.BatchNorm1d)), {"data": padded(0.0)}),
    "a little": lambda: Case(nn.Sequential(norm(8, nn.BatchNorm1d)), {"data": padded(0.1)}),
    "masked": lambda: Case(Masked(), {"data": padded(0.5)}),
    "too short to tell": lambda: Case(
        nn.Sequential(norm(8, nn.BatchNorm1d)), {"data": padded(0.5, 6)}
    ),
}


class _Rows(nn.Module):
    """The digits' rows as a sequence, as an encoder of variable lengths sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = norm(8, nn.BatchNorm1d)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.squeeze(1).transpose(1, 2))


def digits(model: nn.Module, data: Any) -> Case:
    x, _ = next(iter(data))
    x = x.clone()
    x[:, :, 4:] = 0  # the lower half of each image was never scanned
    return Case(_Rows(), {"data": x}, {("bn", "warning")}, {"shape": [64, 8, 8]})
