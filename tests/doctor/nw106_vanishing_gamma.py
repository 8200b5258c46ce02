from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doctor import Case, Cases, net, norm


def weights(**parts: float) -> Any:
    """A norm whose first channels have the scales given."""
    bn = norm()
    for i, value in enumerate(parts.values()):
        bn.weight[i] = value
    return bn


def zero_init() -> Case:
    bn = nn.BatchNorm2d(8)
    nn.init.zeros_(bn.weight)
    cause = "zero-init residual, never trained"
    return Case(net(bn=bn), {}, {("bn", "info")}, {"cause": cause, "channels": 8})


def pruned() -> Case:
    bn = weights(a=0.0, b=0.0)
    return Case(net(bn=bn), {}, {("bn", "info")}, {"cause": "pruned", "zeros": 2})


def decayed() -> Case:
    bn = weights(a=1e-6, b=1e-6, c=-1e-7, d=1e-8, e=0.0)
    return Case(net(bn=bn), {}, {("bn", "warning")}, {"cause": "decayed", "channels": 5})


def decayed_a_little() -> Case:
    bn = weights(a=1e-6)
    return Case(net(bn=bn), {}, {("bn", "info")}, {"cause": "decayed", "channels": 1})


def constant_output() -> Case:
    return Case(net(bn=norm(weight=0.0)), {}, {("bn", "warning")}, {"cause": "constant output"})


def group_norm() -> Case:
    gn = nn.GroupNorm(2, 6)
    gn.weight.data[1] = 0
    return Case(net(gn=gn), {}, {("gn", "info")}, {"channels": 1, "of": 6})


def layer_norm() -> Case:
    ln = nn.LayerNorm(6)
    ln.weight.data[1] = 0
    return Case(net(ln=ln))


FIRES: Cases = {
    "zero-init residual": zero_init,
    "pruned": pruned,
    "decayed": decayed,
    "decayed a little": decayed_a_little,
    "constant output": constant_output,
    "group norm": group_norm,
}
QUIET: Cases = {
    "infinite": lambda: Case(net(bn=weights(a=float("inf")))),
    "trained": lambda: Case(net(bn=norm())),
    "all small alike": lambda: Case(net(bn=norm(weight=1e-5))),
    "layer norm": layer_norm,
    "no parameters": lambda: Case(net(bn=nn.BatchNorm2d(8, affine=False))),
}


def digits(model: Any, data: Any) -> Case:
    """Strong decay on γ alone, without a gradient, as where the loss does not hold it."""
    model.bn2.weight[:16] *= torch.tensor(0.99) ** 1000
    return Case(model, {}, {("bn2", "warning")}, {"cause": "decayed", "channels": 16})
