from __future__ import annotations

from typing import Any

import torch
from networks import NormAct
from torch import Tensor, nn

import normwise as nw
from doctor import Case, Cases, net, norm


class NormRelu(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Counting(nn.BatchNorm2d):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.register_buffer("seen", torch.zeros(()))


class Renamed(nn.BatchNorm2d):
    """Nothing of its own."""


def own_forward() -> Case:
    figures = {"lost": ["forward"], "kind": "NormRelu"}
    return Case(net(bn=NormRelu(8)), {}, {("bn", "info")}, figures)


def children() -> Case:
    lost = ["forward", "child drop", "child act"]
    return Case(net(bn=NormAct(8)), {}, {("bn", "info")}, {"lost": lost})


def buffer() -> Case:
    return Case(net(bn=Counting(8)), {}, {("bn", "info")}, {"lost": ["tensor seen"]})


class Derived(nw.nn.BatchNorm2d):
    """Nothing of its own either."""


def ghost() -> Case:
    bn = nw.nn.GhostBatchNorm(8, ghost_size=2)
    figures = {"lost": ["statistics"], "kind": "GhostBatchNorm"}
    return Case(net(bn=bn), {}, {("bn", "info")}, figures)


def activation() -> Case:
    bn = nw.nn.BatchNorm2d(8, activation="relu")
    return Case(net(bn=bn), {}, {("bn", "info")}, {"lost": ["activation='relu'"]})


FIRES: Cases = {
    "a forward of its own": own_forward,
    "children": children,
    "a buffer": buffer,
    "an activation of normwise's": activation,
    "ghost batches": ghost,
}
QUIET: Cases = {
    "torch.nn's": lambda: Case(net(a=norm(), b=nn.BatchNorm1d(3), c=nn.BatchNorm3d(3))),
    "normwise's": lambda: Case(net(a=nw.nn.BatchNorm2d(8), b=nw.nn.BatchNorm1d(3))),
    "synchronised": lambda: Case(net(a=nn.SyncBatchNorm(8), b=nw.nn.SyncBatchNorm(8))),
    "subclasses without anything": lambda: Case(net(a=Renamed(8), b=Derived(8))),
    "lazy": lambda: Case(net(bn=nn.LazyBatchNorm2d())),
}


def digits(model: Any, data: Any) -> Case:
    """A subclass that takes its activation along; what conversion makes of it is another model."""
    relu = NormRelu(32)
    relu.load_state_dict(model.bn2.state_dict())
    model.bn2 = relu
    return Case(model.eval(), {}, {("bn2", "info")}, {"lost": ["forward"]})
