from __future__ import annotations

from typing import Any

from torch import nn

import normwise as nw
from doctor import Case, Cases, net, norm


def momentum(m: float, severity: str, **figures: Any) -> Case:
    return Case(net(bn=norm(momentum=m)), {}, {("bn", severity)}, {"momentum": m, **figures})


def never_moves() -> Case:
    bn = nn.BatchNorm2d(8, momentum=0.0)
    return Case(net(bn=bn), {}, {("bn", "warning")}, {"momentum": 0})


FIRES: Cases = {
    "Keras": lambda: momentum(0.99, "warning", other=0.01, batches=1.0202),
    "half": lambda: momentum(0.5, "warning", batches=3),
    "the last batch alone": lambda: momentum(1.0, "warning", batches=1),
    "frozen": lambda: momentum(0.0, "info"),
    "never moves": never_moves,
    "negative": lambda: momentum(-0.1, "error"),
    "over one": lambda: momentum(1.5, "error"),
}
QUIET: Cases = {
    "default": lambda: Case(net(bn=norm())),
    "small": lambda: Case(net(bn=norm(momentum=0.003))),
    "below half": lambda: Case(net(bn=norm(momentum=0.49))),
    "plain average": lambda: Case(net(bn=norm(momentum=None))),
    "constants": lambda: Case(net(bn=nw.nn.FrozenBatchNorm(8))),
    "a checkpoint does not say": lambda: Case(net(bn=norm(momentum=0.99)).state_dict()),
}


def digits(model: Any, data: Any) -> Case:
    for bn in (model.bn1, model.bn2):
        bn.momentum = 0.9
    return Case(model, {}, {("bn1", "warning"), ("bn2", "warning")}, {"other": 0.1})
