from __future__ import annotations

import torch
from torch import nn

import normwise as nw
from doctor import Case, Cases, net, norm

FRESH = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}


def buffers_lost() -> Case:
    return Case(
        net(bn1=norm(**FRESH), bn2=norm()), {}, {("bn1", "error")}, {"num_batches_tracked": 0}
    )


def counter_missing() -> Case:
    state = net(bn=norm(**FRESH)).state_dict()
    del state["bn.num_batches_tracked"]
    return Case(state, {}, {("bn", "warning")}, {"channels": 8})


def unused() -> Case:
    return Case(net(bn1=norm(), bn2=nn.BatchNorm2d(4)), {}, {("bn2", "info")}, {"moved": 1})


def uncounted_cumulative() -> Case:
    bn = norm(num_batches_tracked=0, momentum=None)
    return Case(net(bn=bn), {}, {("bn", "warning")}, {"num_batches_tracked": 0})


def random_weights() -> Case:
    """DCGAN's initialization: no bias moved, so nothing was trained."""
    bn = nn.BatchNorm2d(8)
    nn.init.normal_(bn.weight, 1.0, 0.02)
    return Case(net(bn=bn))


def no_counter() -> Case:
    state = net(bn=norm()).state_dict()
    del state["bn.num_batches_tracked"]
    return Case(state)


FIRES: Cases = {
    "buffers lost": buffers_lost,
    "no counter in the checkpoint": counter_missing,
    "unused": unused,
    "uncounted, cumulative": uncounted_cumulative,
}
QUIET: Cases = {
    "fresh": lambda: Case(net(bn1=nn.BatchNorm2d(8), bn2=nn.BatchNorm1d(3))),
    "fresh, zero-init residual": lambda: Case(net(bn=norm(**FRESH, weight=0.0, bias=0.0))),
    "fresh, random weights": random_weights,
    "trained": lambda: Case(net(bn=norm())),
    "not counted": lambda: Case(net(bn=norm(num_batches_tracked=0))),
    "trained, no counter in the checkpoint": no_counter,
    "constants": lambda: Case(net(bn=nw.nn.FrozenBatchNorm(8), other=norm())),
}


def digits(model: nn.Module, data: object) -> Case:
    """Parameters are loaded, buffers are not."""
    fresh = type(model)()
    fresh.load_state_dict(dict(model.named_parameters()), strict=False)
    expect = {(name, "error") for name in ("bn1", "bn2", "bn3")}
    assert torch.equal(fresh.bn1.weight, model.bn1.weight)
    return Case(fresh, {}, expect, {"num_batches_tracked": 0})
