from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doctor import Case, Cases, net, norm


def training() -> Case:
    """bfloat16 at 1.0: a unit in the last place is 2^-7, half of it over m = 0.1 is 3.9 %."""
    bn = norm(running_var=1.0, running_mean=0.0).to(torch.bfloat16)
    figures = {"stall_variance": 2**-8 / 0.1, "dtype": "bfloat16", "training": True}
    return Case(net(bn=bn.train()), {}, {("bn", "warning")}, figures)


def overflow() -> Case:
    bn = norm(running_var=5000.0).half().eval()
    return Case(net(bn=bn), {}, {("bn", "warning")}, {"largest": 5000, "limit": 65504})


def rounded_mean() -> Case:
    """Between 16 and 32 bfloat16 has steps of 1/8; half of that is 0.0625 deviations of 1."""
    bn = norm(running_mean=17.0, running_var=1.0).to(torch.bfloat16)
    return Case(net(bn=bn).state_dict(), {}, {("bn", "warning")}, {"shift": 0.0625})


def serving() -> Case:
    bn = norm(running_mean=1.0, running_var=1.0).half().eval()
    return Case(net(bn=bn), {}, {("bn", "info")}, {"shift": 2**-11, "training": False})


FIRES: Cases = {
    "training": training,
    "overflow": overflow,
    "a rounded mean": rounded_mean,
    "serving": serving,
}


def mixed() -> Case:
    bn = norm().half()
    for name in ("running_mean", "running_var"):
        setattr(bn, name, getattr(bn, name).float())
    return Case(net(bn=bn))


QUIET: Cases = {
    "float32": lambda: Case(net(bn=norm())),
    "float64": lambda: Case(net(bn=norm().double())),
    "half parameters alone": mixed,
    "layer norm": lambda: Case(net(ln=nn.LayerNorm(4).half())),
}


def digits(model: Any, data: Any) -> Case:
    expect = {(name, "warning") for name in ("bn1", "bn2", "bn3")}
    return Case(model.to(torch.bfloat16).train(), {}, expect, {"dtype": "bfloat16"})
