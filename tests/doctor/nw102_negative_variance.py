from __future__ import annotations

import torch
from torch import nn

from doctor import Case, Cases, net, norm


def extrapolated() -> Case:
    a, b = norm(running_var=1.0), norm(running_var=4.0)
    a.running_var -= 0.5 * (b.running_var - a.running_var)
    return Case(net(bn=a), {}, {("bn", "error")}, {"channels": 8, "lowest": -0.5, "nan": 8})


def within_eps() -> Case:
    bn = norm()
    bn.running_var[1] = -5e-6
    return Case(net(bn1=norm(), bn2=bn), {}, {("bn2", "error")}, {"nan": 0, "which": [1]})


def state_dict() -> Case:
    state = net(bn=norm()).state_dict()
    state["bn.running_var"][0] = -1
    return Case(state, {}, {("bn", "error")}, {"channels": 1})


FIRES: Cases = {
    "extrapolated weights": extrapolated,
    "within eps": within_eps,
    "a state dict": state_dict,
}
QUIET: Cases = {
    "trained": lambda: Case(net(bn=norm())),
    "zero": lambda: Case(net(bn=norm(running_var=0.0))),
    "NaN": lambda: Case(net(bn=norm(running_var=float("nan")))),
}


def digits(model: nn.Module, data: object) -> Case:
    other = torch.ones_like(model.bn2.running_var) * 40
    model.bn2.running_var.add_(other - model.bn2.running_var, alpha=-0.5)
    return Case(model, {}, {("bn2", "error")}, {"channels": 32, "nan": 32})
