from __future__ import annotations

from typing import Any

import torch

from doctor import Case, Cases, net, norm


def tenth() -> Case:
    """Variances of 5e-5 beside 1e-5: sqrt(5 / 6) = 0.913 of the deviation is left."""
    bn = norm(running_var=5e-5)
    return Case(net(bn=bn), {}, {("bn", "info")}, {"channels": 8, "deviation": 0.9129})


def larger() -> Case:
    bn = norm(running_var=1e-6)
    return Case(net(bn=bn), {}, {("bn", "warning")}, {"deviation": 0.3015})


def half() -> Case:
    bn = norm()
    bn.running_var[:4] = 5e-5
    return Case(net(bn=bn), {}, {("bn", "info")}, {"channels": 4})


FIRES: Cases = {"a tenth": tenth, "larger than the variance": larger, "half of the layer": half}


def few() -> Case:
    bn = norm()
    bn.running_var[:3] = 5e-5
    return Case(net(bn=bn))


QUIET: Cases = {
    "trained": lambda: Case(net(bn=norm())),
    "few channels": few,
    "constant channels": lambda: Case(net(bn=norm(running_var=0.0))),
    "just above": lambda: Case(net(bn=norm(running_var=1.01e-4))),
    "a small eps": lambda: Case(net(bn=norm(running_var=5e-5, eps=1e-6))),
}


def digits(model: Any, data: Any) -> Case:
    """Weights a thousand times smaller: in training nothing changes but for eps."""
    model.conv2.weight *= 1e-3
    model.bn2.momentum = 0.4
    model.train()
    for _ in range(2):
        for x, _ in data:
            model(x)
    expect = {("bn2", "warning" if float(model.bn2.running_var.median()) < 1e-5 else "info")}
    assert torch.all(model.bn2.running_var < 1e-4)
    return Case(model.eval(), {}, expect, {"channels": 32, "eps": 1e-5})
