from __future__ import annotations

import torch
from torch import Tensor, nn

from doctor import Case, Cases, norm

X = torch.ones(2, 3, 6, 6)


class Head(nn.Module):
    """A detection head: one convolution over two levels, a norm for each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norms = nn.ModuleList([norm(), norm()])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [bn(self.conv(level)) for bn, level in zip(self.norms, (x, x[..., :4]), strict=True)]


class Read(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = norm()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([self.bn(y), y], 1)


class Twice(nn.Module):
    """Both called twice: the norm folds, for every call of the convolution is followed by it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3), norm())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block(-x)


FIRES: Cases = {
    "a norm a level": lambda: Case(
        Head(),
        {"example_inputs": X},
        {("norms.0", "info"), ("norms.1", "info")},
        {"before": "conv", "calls": 2},
    ),
    "read by others": lambda: Case(
        Read(), {"example_inputs": X}, {("bn", "info")}, {"readers": 2, "calls": 1}
    ),
}
QUIET: Cases = {
    "one call": lambda: Case(nn.Sequential(nn.Conv2d(3, 8, 3), norm()), {"example_inputs": X}),
    "shared together": lambda: Case(Twice(), {"example_inputs": X}),
}


class _Shared(nn.Module):
    """The digits network, whose second convolution runs on the mirrored image too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.model.bn1(self.model.conv1(x.flip(-1))))
        return self.model(x) + self.model.conv2(inner).mean()


def digits(model: nn.Module, data: object) -> Case:
    x = torch.ones(2, 1, 8, 8)
    return Case(_Shared(model), {"example_inputs": x}, {("model.bn2", "info")}, {"calls": 2})
