from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doctor import Case, Cases, net, norm


def timestamp() -> Case:
    """1e5 / 1 in float32: 1.192e-7 of that is 0.01192."""
    bn = norm(running_mean=1e5, running_var=1.0)
    return Case(net(bn=bn), {}, {("bn", "warning")}, {"ratio": 1e5, "error": 0.01192})


def hopeless() -> Case:
    bn = norm(running_var=1.0)
    bn.running_mean[4] = -1e7
    return Case(net(bn=bn), {}, {("bn", "error")}, {"error": 1.192, "which": [4]})


def half() -> Case:
    bn = norm(running_mean=20.0, running_var=1.0).half().eval()
    return Case(net(bn=bn), {}, {("bn", "warning")}, {"dtype": "float16", "error": 0.01953})


def constant() -> Case:
    bn = norm()
    bn.running_mean[0], bn.running_var[0] = 30.0, 1e-9
    return Case(net(bn=bn))


FIRES: Cases = {"a timestamp": timestamp, "hopeless": hopeless, "half precision": half}
QUIET: Cases = {
    "trained": lambda: Case(net(bn=norm())),
    "large, float64": lambda: Case(net(bn=norm(running_mean=1e5, running_var=1.0).double())),
    "just below": lambda: Case(net(bn=norm(running_mean=830.0, running_var=1.0))),
    "a constant channel": constant,
    "infinite": lambda: Case(net(bn=norm(running_mean=float("inf")))),
}


def digits(model: Any, data: Any) -> Case:
    """A constant in the input of the second norm, as a bias that grew; the batch takes it out."""
    bias = nn.Parameter(torch.full((32,), 1e4))
    model.conv2.register_parameter("bias", bias)
    model.train()
    for _ in range(4):
        for x, _ in data:
            model(x)
    assert float(model.bn2.running_mean.min()) > 5e3
    return Case(model.eval(), {}, {("bn2", "warning")}, {"channels": 32, "dtype": "float32"})
