from __future__ import annotations

from typing import Any

from torch import nn

from doctor import Case, Cases, net, norm


def flag_off() -> Case:
    bn = norm(track_running_stats=False)
    expect = {("bn", "warning")}
    return Case(net(bn=bn), {}, expect, {"buffers": ["running_mean", "running_var"]})


def buffers_gone() -> Case:
    bn = norm()
    bn.running_mean = bn.running_var = None
    return Case(net(bn=bn), {}, {("bn", "error")}, {"buffers": []})


def one_gone() -> Case:
    bn = norm()
    bn.running_var = None
    return Case(net(bn=bn), {}, {("bn", "error")}, {"buffers": ["running_mean"]})


def untracked() -> Case:
    bn = nn.BatchNorm2d(8, track_running_stats=False)
    return Case(net(bn=bn), {}, {("bn", "info")}, {"track_running_stats": False})


def instance_norm() -> Case:
    layer = nn.InstanceNorm2d(4, track_running_stats=True)
    layer.track_running_stats = False
    expect = {("norm", "warning")}
    return Case(net(norm=layer), {}, expect, {"track_running_stats": False})


FIRES: Cases = {
    "flag off": flag_off,
    "buffers gone": buffers_gone,
    "one buffer gone": one_gone,
    "untracked": untracked,
    "instance norm": instance_norm,
}
QUIET: Cases = {
    "trained": lambda: Case(net(bn=norm())),
    "fresh": lambda: Case(net(bn=nn.BatchNorm1d(3))),
    "instance norm without statistics": lambda: Case(net(norm=nn.InstanceNorm2d(4))),
}


def digits(model: Any, data: Any) -> Case:
    for bn in (model.bn1, model.bn3):
        bn.track_running_stats = False
    return Case(model, {}, {("bn1", "warning"), ("bn3", "warning")}, {"track_running_stats": False})
