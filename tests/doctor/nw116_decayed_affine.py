from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doctor import Case, Cases, net, norm


def model() -> nn.Module:
    return net(conv=nn.Conv2d(3, 8, 3), bn1=norm(), bn2=norm(), ln=nn.LayerNorm(4))


def everything() -> Case:
    made = model()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1, weight_decay=0.05)
    figures = {"norms": 3, "of": 3, "weight_decay": 0.05, "layers": ["bn1", "bn2", "ln"]}
    return Case(made, {"optimizer": optimizer}, {("", "warning")}, figures)


def one_group() -> Case:
    made = model()
    rest = [p for n, p in made.named_parameters() if n != "bn2.bias"]
    groups = [{"params": rest}, {"params": [made.bn2.bias], "weight_decay": 1e-4}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    return Case(made, {"optimizer": optimizer}, {("", "warning")}, {"layers": ["bn2"], "norms": 1})


def matrices() -> Case:
    made = model()
    groups = [
        {"params": [made.conv.weight], "weight_decay": 1e-4},
        {"params": [p for p in made.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return Case(made, {"optimizer": torch.optim.SGD(groups, lr=0.1)})


def no_decay() -> Case:
    made = model()
    return Case(made, {"optimizer": torch.optim.SGD(made.parameters(), lr=0.1)})


FIRES: Cases = {"everything": everything, "one group": one_group}
QUIET: Cases = {
    "matrices alone": matrices,
    "no decay": no_decay,
    "no optimizer": lambda: Case(model()),
}


def digits(model: Any, data: Any) -> Case:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=5e-4)
    figures = {"norms": 3, "weight_decay": 5e-4}
    return Case(model, {"optimizer": optimizer}, {("", "warning")}, figures)
