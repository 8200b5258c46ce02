from __future__ import annotations

from typing import Any

import torch
from torch import nn

import normwise as nw
from doctor import Case, Cases, net, norm


def short() -> Case:
    """After 20 batches with variance 0.01: 0.9^20 = 0.1216 of the initial 1 is left, and the
    deviation is sqrt(0.1304 / 0.01) times the data's."""
    bn = norm(running_var=0.9**20 + (1 - 0.9**20) * 0.01, num_batches_tracked=20)
    figures = {"left": 0.12158, "needed": 44, "deviation": 3.609}
    return Case(net(bn=bn), {}, {("bn", "warning")}, figures)


def small_momentum() -> Case:
    bn = nn.BatchNorm1d(4, momentum=0.01)
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        bn(torch.randn(32, 4, generator=g))
    return Case(net(bn=bn), {}, {("bn", "warning")}, {"left": 0.366, "needed": 459})


def state_dict() -> Case:
    state = net(bn=norm(num_batches_tracked=43)).state_dict()
    return Case(state, {}, {("bn", "warning")}, {"momentum": 0.1, "left": 0.01078})


def recalibrated() -> Case:
    """From 4 batches, exactly; a variance of 0.5 holds no 0.66 of an initial 1."""
    g = torch.Generator().manual_seed(0)
    data = [torch.randn(16, 3, generator=g) * 0.7 for _ in range(4)]
    return Case(nw.recalibrate(nn.BatchNorm1d(3), data, progress=False).model)


FIRES: Cases = {"short": short, "small momentum": small_momentum, "a checkpoint": state_dict}
QUIET: Cases = {
    "just enough": lambda: Case(net(bn=norm(num_batches_tracked=44))),
    "fresh": lambda: Case(net(bn=nn.BatchNorm2d(8))),
    "plain average": lambda: Case(net(bn=norm(momentum=None, num_batches_tracked=3))),
    "recalibrated": recalibrated,
    "infinite": lambda: Case(net(bn=norm(running_var=float("inf"), num_batches_tracked=5))),
    "no counter": lambda: Case(
        {k: v for k, v in net(bn=norm()).state_dict().items() if "tracked" not in k}
    ),
}


def digits(model: Any, data: Any) -> Case:
    """Statistics were reset, and 22 batches seen since."""
    model.bn2.reset_running_stats()
    model.train()
    for x, _ in data:
        model(x)
    return Case(model.eval(), {}, {("bn2", "warning")}, {"num_batches_tracked": 22, "left": 0.0985})
