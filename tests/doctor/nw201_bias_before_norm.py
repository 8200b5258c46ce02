from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from doctor import Case, Cases, norm

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def sequence(**modules: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(modules))


class Residual(nn.Module):
    """The convolution's output is read by the norm and by the addition: the bias is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = norm()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class Twice(nn.Module):
    """One convolution, one norm, both called twice: the bias never shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(self.conv(2 * x))


def check_on(model: nn.Module, x: Tensor = X, **expected: object) -> Case:
    return Case(model, {"example_inputs": x}, **expected)


FIRES: Cases = {
    "convolution": lambda: check_on(
        sequence(conv=nn.Conv2d(3, 8, 3), bn=norm()),
        expect={("bn", "info")},
        figures={"before": "conv", "values": 8},
    ),
    "linear": lambda: check_on(
        sequence(fc=nn.Linear(5, 8), bn=norm(8, nn.BatchNorm1d)),
        torch.ones(4, 5),
        expect={("bn", "info")},
        figures={"before": "fc"},
    ),
    "transposed convolution": lambda: check_on(
        sequence(up=nn.ConvTranspose2d(3, 8, 2), bn=norm()),
        expect={("bn", "info")},
        figures={"before": "up"},
    ),
    "both shared": lambda: check_on(Twice(), expect={("bn", "info")}, figures={"values": 8}),
}
QUIET: Cases = {
    "no bias": lambda: check_on(sequence(conv=nn.Conv2d(3, 8, 3, bias=False), bn=norm())),
    "read by another": lambda: check_on(Residual()),
    "activation between": lambda: check_on(
        sequence(conv=nn.Conv2d(3, 8, 3), relu=nn.ReLU(), bn=norm())
    ),
    "other axis": lambda: check_on(
        sequence(fc=nn.Linear(5, 8), bn=norm(8, nn.BatchNorm1d)), torch.ones(4, 8, 5)
    ),
    "features, not channels": lambda: check_on(
        sequence(fc=nn.Linear(5, 72), view=nn.Unflatten(1, (8, 3, 3)), bn=norm()), torch.ones(4, 5)
    ),
}


def digits(model: nn.Module, data: object) -> Case:
    model.conv2.bias = nn.Parameter(torch.full((32,), 0.5))
    x = torch.ones(2, 1, 8, 8)
    return check_on(model, x, expect={("bn2", "info")}, figures={"before": "conv2", "values": 32})
