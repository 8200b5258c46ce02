from __future__ import annotations

import torch
from torch import nn

from doctor import Case, Cases, net, norm


def infinite_batch() -> Case:
    model = net(bn1=norm(), bn2=norm())
    model.bn2(torch.full((2, 8, 4, 4), float("inf")))
    # An average of infinities is infinite, their variance NaN.
    return Case(model, {}, {("bn2", "error")}, {"tensor": "running_var", "channels": 8, "of": 8})


def nan_weight() -> Case:
    bn = norm()
    bn.weight.data[3] = float("nan")
    return Case(net(bn=bn), {}, {("bn", "error")}, {"tensor": "weight", "channels": 1})


def layer_norm() -> Case:
    ln = nn.LayerNorm(6)
    ln.bias.data[:2] = float("inf")
    return Case(net(ln=ln), {}, {("ln", "error")}, {"channels": 2, "of": 6})


FIRES: Cases = {
    "infinite batch": infinite_batch,
    "NaN in a weight": nan_weight,
    "layer norm": layer_norm,
}
QUIET: Cases = {
    "trained": lambda: Case(net(bn=norm())),
    "largest numbers": lambda: Case(net(bn=norm(running_mean=3e38, running_var=3e38))),
    "nothing to look at": lambda: Case(
        net(bn=nn.BatchNorm2d(8, affine=False, track_running_stats=False))
    ),
}


def digits(model: nn.Module, data: object) -> Case:
    model.bn1.running_mean[2] = float("inf")
    return Case(model, {}, {("bn1", "error")}, {"channels": 1, "of": 16})
