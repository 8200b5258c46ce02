from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doctor import Case, Cases, net, norm


def constant() -> Case:
    """A unit that never opens, its γ as large as any: 1 / sqrt(1e-5) = 316."""
    bn = nn.BatchNorm2d(8, momentum=0.4)
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        x = torch.randn(4, 8, 3, 3, generator=g)
        x[:, 3] = 0
        bn(x)
    figures = {"constant": 1, "loud": 1, "which": [3], "scale": 316.2}
    return Case(net(bn=bn), {}, {("bn", "warning")}, figures)


def quiet_and_dead() -> Case:
    """Decayed together with its γ: it does nothing."""
    bn = norm()
    bn.running_var[5], bn.weight[5] = 1e-12, 1e-5
    return Case(net(bn=bn), {}, {("bn", "info")}, {"constant": 1, "loud": 0, "which": [5]})


def loud() -> Case:
    bn = norm(weight=1.0, running_var=1.0)
    bn.weight[2] = 150.0
    return Case(net(bn=bn), {}, {("bn", "warning")}, {"constant": 0, "loud": 1, "scale": 150.0})


def all_dead() -> Case:
    return Case(
        net(bn=norm(running_var=0.0)), {}, {("bn", "info")}, {"constant": 8, "variance": 0.0}
    )


def switched_off() -> Case:
    bn = norm()
    bn.running_var[5], bn.weight[5] = 0.0, 0.0
    return Case(net(bn=bn))


FIRES: Cases = {
    "constant": lambda: constant(),
    "dead with its scale": quiet_and_dead,
    "loud": loud,
    "all dead": all_dead,
}
QUIET: Cases = {
    "trained": lambda: Case(net(bn=norm())),
    "fresh": lambda: Case(net(bn=nn.BatchNorm2d(8))),
    "γ is 0 there": switched_off,
    "small scale all over": lambda: Case(net(bn=norm(running_var=2e-5))),
    "no parameters": lambda: Case(net(bn=nn.BatchNorm2d(8, affine=False))),
}


def digits(model: Any, data: Any) -> Case:
    """One filter is cut, and training goes on (with a larger momentum, to be there sooner)."""
    model.conv2.weight[7] = 0
    model.bn2.momentum = 0.4
    model.train()
    for _ in range(2):
        for x, _ in data:
            model(x)
    return Case(model.eval(), {}, {("bn2", "warning")}, {"constant": 1, "which": [7]})
