from __future__ import annotations

from typing import Any

from torch import nn

import normwise as nw
from doctor import Case, Cases, net, norm


def frozen(**held: Any) -> Any:
    bn = norm(**held).requires_grad_(False)
    return bn.train()


def alone() -> Case:
    model = net(bn1=frozen(), bn2=norm())
    return Case(model, {}, {("bn1", "warning")}, {"momentum": 0.1, "model_frozen": False})


def cumulative() -> Case:
    return Case(net(bn1=frozen(momentum=None)), {}, {("bn1", "warning")}, {"parameters": 2})


def without_parameters() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False))
    model.requires_grad_(False)
    return Case(model, {}, {("1", "warning")}, {"model_frozen": True, "parameters": 0})


FIRES: Cases = {
    "a frozen norm": alone,
    "cumulative": cumulative,
    "a frozen model": without_parameters,
}
QUIET: Cases = {
    "trained": lambda: Case(net(bn=norm().train())),
    "eval": lambda: Case(net(bn=frozen().eval())),
    "momentum 0": lambda: Case(net(bn=frozen(momentum=0.0))),
    "held": lambda: Case(net(bn=nw.nn.BatchNorm2d(8, update_stats=False).requires_grad_(False))),
    "constants": lambda: Case(net(bn=nw.nn.FrozenBatchNorm(8))),
    "no parameters in a model that trains": lambda: Case(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False))
    ),
}


def digits(model: Any, data: Any) -> Case:
    """A frozen backbone under a new head."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    expect = {(name, "warning") for name in ("bn1", "bn2", "bn3")}
    return Case(model.train(), {}, expect, {"parameters": 2})
