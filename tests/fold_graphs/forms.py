"""Forms in which a model may come: norms of all kinds, dtypes, containers, inputs, outputs."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normwise as nw
from fold_graphs.base import Graph, Net, images, normal, signals, tokens, vectors
from fold_graphs.obstacles import conv

FOLDED = {"bn": "folded"}
B2 = nn.BatchNorm2d
BF16, F16 = torch.bfloat16, torch.float16


class Functional(nn.Module):
    """A batch norm written as a function call, with tensors of its own."""

    def __init__(self, how: str, channels: int = 3) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean: Any = self.running_mean
        var: Any = self.running_var
        if self.how == "F":
            return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, eps=1e-3)
        if self.how == "F without scale":
            return F.batch_norm(x, mean, var)
        if self.how == "F with keywords":
            return F.batch_norm(
                running_var=var, input=x, bias=self.bias, running_mean=mean, weight=self.weight
            )
        if self.how == "F in training":
            return F.batch_norm(x, mean.clone(), var.clone(), self.weight, self.bias, True)
        if self.how == "torch":
            return torch.batch_norm(x, self.weight, self.bias, mean, var, False, 0.1, 1e-5, False)
        if self.how == "torch native":
            return torch.native_batch_norm(x, self.weight, self.bias, mean, var, False, 0.1, 1e-5)[
                0
            ]
        if self.how == "normwise":
            return nw.functional.batch_norm(x, mean, var, self.weight, self.bias)
        if self.how == "by hand":
            shape = (1, -1, 1, 1)
            y = (x - mean.view(shape)) * (var.view(shape) + 1e-5).rsqrt()
            return y * self.weight.view(shape) + self.bias.view(shape)
        return F.batch_norm(x, mean * 1, var, self.weight, self.bias)


class Own(nn.BatchNorm2d):
    """A subclass with a forward of its own, around torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)


class Squared(nn.BatchNorm2d):
    """A subclass that is no batch norm at all."""

    def forward(self, input: Tensor) -> Tensor:
        return input * input


class Renamed(nn.BatchNorm2d):
    """A subclass without a forward of its own."""


class Flat(nn.BatchNorm1d):
    """Tokens flattened around torch's, as graph networks do."""

    def forward(self, input: Tensor) -> Tensor:
        shape = input.shape
        return super().forward(input.reshape(-1, shape[-1])).view(shape)


def after(norm: nn.Module) -> Net:
    return conv(lambda m, x: m.bn(m.c(x)), bn=norm)


NORMS = [
    *(Graph(f"functional: {how}", lambda h=how: after(Functional(h)), images(),
            {"bn.batch_norm": expect}) for how, expect in (
                ("F", "folded"), ("F without scale", "folded"), ("F with keywords", "folded"),
                ("torch", "folded"), ("torch native", "folded"), ("normwise", "folded"),
                ("F in training", "left: training-mode"),
                ("mean computed", "left: not-a-parameter"))),
    Graph("functional, nothing to fold into", lambda: Net(lambda m, x: m.bn(x).relu(),
                                                          bn=Functional("F")), images(),
          {"bn.batch_norm": "left"}),
    Graph("functional → conv", lambda: conv(lambda m, x: m.c(m.bn(x)), bn=Functional("F")),
          images(), {"bn.batch_norm": "folded"}),
    Graph("by hand, and a true one", lambda: conv(lambda m, x: m.bn(m.h(m.c(x))),
                                                  h=Functional("by hand")), images(),
          {"bn": "multiply-add"}),
    Graph("two functional calls with one set of tensors",
          lambda: conv(lambda m, x: m.bn(m.c(x)) + m.bn(m.d(x)), bn=Functional("F")), images(),
          {"bn.batch_norm": "folded"}),
    Graph("subclass with a forward of its own", lambda: after(Own(3)), images(),
          {"bn": "folded"}),
    Graph("subclass with a forward of its own, nothing to fold into",
          lambda: Net(lambda m, x: m.bn(x).relu(), bn=Own(3)), images(),
          {"bn": "left: custom-forward"}),
    Graph("subclass that is no batch norm",
          lambda: conv(lambda m, x: m.bn(m.c(x)) + m.s(x), s=Squared(3)), images(),
          {"bn": "folded", "s": "left"}),
    Graph("subclass without a forward of its own", lambda: after(Renamed(3)), images(), FOLDED),
    Graph("subclass that flattens tokens",
          lambda: Net(lambda m, x: m.bn(m.fc(x)), fc=nn.Linear(6, 4), bn=Flat(4)),
          lambda: [normal(2, 5, 6), normal(3, 4, 6, seed=1)], FOLDED),
    Graph("ours, with an activation",
          lambda: after(nw.nn.BatchNorm2d(3, activation="leaky_relu")), images(), FOLDED),
    Graph("ours, with an activation, then another norm",
          lambda: conv(lambda m, x: m.post(m.bn(m.c(x))), post=B2(3),
                       bn=nw.nn.BatchNorm2d(3, activation="silu")), images(),
          {"bn": "folded", "post": "multiply-add"}),
    Graph("ours, with a residual and an activation",
          lambda: conv(lambda m, x: m.bn(m.c(x), residual=x),
                       bn=nw.nn.BatchNorm2d(3, activation="relu")), images(), FOLDED),
    Graph("ours, its own input as the residual",
          lambda: conv(lambda m, x: m.bn(y := m.c(x), residual=y),
                       bn=nw.nn.BatchNorm2d(3)), images(), {"bn": "multiply-add: used-elsewhere"}),
    Graph("ours, with a residual, no activation, then another norm",
          lambda: conv(lambda m, x: m.post(m.bn(m.c(x), residual=m.d(x))), post=B2(3),
                       bn=nw.nn.BatchNorm2d(3)), images(), {"bn": "folded", "post": "folded"}),
    Graph("ours, with a residual, before a convolution",
          lambda: conv(lambda m, x: m.c(m.bn(x, residual=x.tanh())),
                       bn=nw.nn.BatchNorm2d(3)), images(), {"bn": "multiply-add"}),
    Graph("ours, channels last",
          lambda: Net(lambda m, x: m.bn(m.c(x).permute(0, 2, 3, 1)), c=nn.Conv2d(3, 4, 3),
                      bn=nw.nn.BatchNorm2d(4, channel_dim=-1)), images(), FOLDED),
    Graph("ours, channels last, with a mask",
          lambda: conv(lambda m, x: m.bn(m.c(x), mask=torch.ones(len(x), 1, 1, 1).bool()),
                       bn=nw.nn.BatchNorm2d(3)), images(), {"bn": "left: masked"}),
    Graph("torch's SyncBatchNorm", lambda: after(nn.SyncBatchNorm(3)), images(), FOLDED),
    Graph("without affine", lambda: after(B2(3, affine=False)), images(), FOLDED),
    Graph("without running statistics", lambda: after(B2(3, track_running_stats=False)), images(),
          {"bn": "left: no-running-statistics"}),
    Graph("momentum None", lambda: after(B2(3, momentum=None)), images(), FOLDED),
    Graph("eps 0", lambda: after(B2(3, eps=0.0)), images(), FOLDED),
    Graph("left in training mode", lambda: after(B2(3)), images(), {"bn": "left: training-mode"},
          prepare=lambda m: m.bn.train()),
    Graph("convolution left in training mode", lambda: after(B2(3)), images(), FOLDED,
          prepare=lambda m: m.c.train()),
    Graph("a dropout left in training mode between",
          lambda: conv(lambda m, x: m.bn(m.drop(m.c(x))), drop=nn.Dropout(0.5)), images(),
          {"bn": "multiply-add"}, prepare=lambda m: m.drop.train()),
    Graph("some scales zero", lambda: after(B2(3)), images(), FOLDED,
          prepare=lambda m: nn.init.zeros_(m.bn.weight[:2])),
    Graph("all scales zero, down", lambda: conv(lambda m, x: m.c(m.bn(x))), images(), FOLDED,
          prepare=lambda m: nn.init.zeros_(m.bn.weight)),
    Graph("a variance of zero", lambda: after(B2(3)), images(), FOLDED, tolerance=1e-3,
          prepare=lambda m: m.bn.running_var[:1].zero_()),
    Graph("a variance of infinity", lambda: after(B2(3)), images(), FOLDED,
          prepare=lambda m: m.bn.running_var[:1].fill_(float("inf"))),
    Graph("a mean of NaN", lambda: conv(lambda m, x: m.bn(m.c(x))[:, 1:]), images(),
          {"bn": "left: not-finite"}, prepare=lambda m: m.bn.running_mean[:1].fill_(float("nan"))),
    Graph("batch norm at the input", lambda: Net(lambda m, x: m.bn(x).relu(), bn=B2(3)), images(),
          {"bn": "multiply-add: blocked"}),
    Graph("a batch norm alone", lambda: nn.BatchNorm2d(3), images(), {"": "multiply-add"}),
    Graph("lazy layers, initialised",
          lambda: _initialised(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())), images(),
          {"1": "folded"}),
    Graph("our lazy norm, initialised",
          lambda: _initialised(nn.Sequential(nn.Conv2d(3, 4, 3), nw.nn.LazyBatchNorm2d())),
          images(), {"1": "folded"}),
]  # fmt: skip


@dataclasses.dataclass
class Output:
    main: Tensor
    rest: Any


Pair = collections.namedtuple("Pair", "first second")

FORMS = [
    Graph("bfloat16", lambda: conv(lambda m, x: m.bn(m.c(x))).to(BF16), images(), FOLDED,
          dtype=BF16, tolerance=0.05),
    Graph("float16", lambda: conv(lambda m, x: m.bn(m.c(x))).half(), images(), FOLDED,
          dtype=F16, tolerance=0.01),
    Graph("bfloat16 convolution, float32 norm",
          lambda: _mixed(conv(lambda m, x: m.bn(m.c(x)).float())), images(),
          {"bn": ""}, dtype=BF16, tolerance=0.05),
    Graph("float32 convolution, cast to bfloat16 for the norm",
          lambda: conv(lambda m, x: m.bn(m.c(x).bfloat16()).float()), images(), {"bn": ""},
          dtype=torch.float32, tolerance=0.05),
    Graph("autocast inside forward",
          lambda: conv(_autocast), images(), FOLDED, dtype=torch.float32, tolerance=0.05),
    Graph("float64 inside, float32 outside",
          lambda: _double(conv(lambda m, x: m.bn(m.c(x.double())).float())), images(), FOLDED,
          dtype=torch.float32, tolerance=1e-5),
    Graph("a batch of one", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), B2(4)),
          lambda: [normal(1, 3, 6, 6), normal(4, 3, 9, 6, seed=1)], {"1": "folded"}),
    Graph("an empty batch as the example", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), B2(4)),
          lambda: [normal(0, 3, 6, 6), normal(4, 3, 9, 6, seed=1)], {"1": ""}),
    Graph("an empty batch later", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), B2(4)),
          lambda: [normal(2, 3, 6, 6), normal(0, 3, 9, 6, seed=1)], {"1": "folded"}),
    Graph("one position", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), B2(4), nn.Conv2d(4, 2, 1)),
          lambda: [normal(2, 3, 3, 3), normal(4, 3, 9, 6, seed=1)], {"1": "folded"}),
    Graph("zero-padded convolution of one position",
          lambda: nn.Sequential(B2(3), nn.Conv2d(3, 2, 3, padding=1)),
          lambda: [normal(2, 3, 1, 1), normal(4, 3, 9, 6, seed=1)], {"0": "folded"}),
    Graph("average pool of one position, zeros counted later",
          lambda: Net(lambda m, x: m.bn(F.avg_pool2d(m.c(x), 2, ceil_mode=True)),
                      c=nn.Conv2d(3, 4, 1), bn=B2(4)),
          lambda: [normal(2, 3, 2, 2), normal(2, 3, 5, 5, seed=1)], FOLDED),
    Graph("channels of a size of one",
          lambda: nn.Sequential(nn.Conv2d(3, 1, 3), B2(1)), images(), {"1": "folded"}),
    Graph("image as wide as there are channels",
          lambda: Net(lambda m, x: m.bn(m.c(x)), c=nn.Conv2d(3, 6, 3), bn=B2(6)), images(3, 8),
          FOLDED),
    Graph("tuple, None and number out",
          lambda: conv(lambda m, x: (m.bn(m.c(x)), None, 3, "a")), images(), FOLDED),
    Graph("dict out", lambda: conv(lambda m, x: {"y": m.bn(m.c(x)), "x": [x]}), images(), FOLDED),
    Graph("dataclass out", lambda: conv(lambda m, x: Output(m.bn(m.c(x)), {"x": x})), images(),
          FOLDED),
    Graph("dataclass out that holds the convolution's output",
          lambda: conv(lambda m, x: Output(m.bn(y := m.c(x)), [y])), images(),
          {"bn": "multiply-add: is-output"}),
    Graph("namedtuple out", lambda: conv(lambda m, x: Pair(m.bn(m.c(x)), x)), images(), FOLDED),
    Graph("keyword arguments alone",
          lambda: conv(lambda m, *, image, scale=1.0: m.bn(m.c(image)) * scale),
          lambda: [{"image": normal(2, 3, 6, 6)}, {"image": normal(3, 3, 5, 6), "scale": 2.0}],
          FOLDED),
    Graph("several arguments",
          lambda: conv(lambda m, x, other: m.bn(m.c(x) + m.d(other))),
          lambda: [(normal(2, 3, 6, 6), normal(2, 3, 6, 6, seed=1)),
                   (normal(1, 3, 5, 6), normal(1, 3, 5, 6, seed=1))], FOLDED),
    Graph("a nested argument", lambda: conv(lambda m, batch: m.bn(m.c(batch["x"][0]))),
          lambda: [({"x": [normal(2, 3, 6, 6)]},), ({"x": [normal(1, 3, 9, 6)]},)], FOLDED),
    Graph("integers in",
          lambda: Net(lambda m, i: m.bn(m.fc(F.one_hot(i, 11).to(m.fc.weight.dtype))),
                      fc=nn.Linear(11, 4), bn=nn.BatchNorm1d(4)), tokens(11, 5), FOLDED),
    Graph("nested Sequential",
          lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential()),
                                nn.Sequential(B2(4), nn.ReLU())), images(), {"1.0": "folded"}),
    Graph("ModuleList",
          lambda: Net(_chain, layers=nn.ModuleList([nn.Conv2d(3, 3, 3), B2(3)] * 1)), images(),
          {"layers.1": "folded"}),
    Graph("ModuleDict",
          lambda: Net(lambda m, x: m.d["n"](m.d["c"](x)),
                      d=nn.ModuleDict({"c": nn.Conv2d(3, 3, 3), "n": B2(3)})), images(),
          {"d.n": "folded"}),
    Graph("a convolution in a plain list",
          lambda: Net(lambda m, x: m.bn(m.hidden[0](x)), hidden=[nn.Conv2d(3, 3, 3)], bn=B2(3)),
          images(), {"bn": "multiply-add"}, dtype=torch.float32, tolerance=2e-4),
    Graph("weights that are plain attributes",
          lambda: Net(lambda m, x: m.bn(F.conv2d(x, m.w.to(x.dtype))), w=normal(3, 3, 3, 3),
                      bn=B2(3)), images(), {"bn": "multiply-add"}),
    Graph("weights that are buffers", lambda: _buffered(), images(), FOLDED),
    Graph("frozen weights", lambda: conv(lambda m, x: m.bn(m.c(x))).requires_grad_(False),
          images(), FOLDED),
    Graph("scripted sub-module before the norm",
          lambda: conv(lambda m, x: m.bn(m.s(x)), s=_scripted(nn.Conv2d(3, 3, 3))),
          images(), {"bn": ""}),
    Graph("scripted sub-module that holds a norm",
          lambda: conv(lambda m, x: m.bn(m.c(m.s(x))),
                       s=_scripted(nn.Sequential(nn.Conv2d(3, 3, 3), B2(3)))), images(),
          {"bn": "folded", "s.1": "left"}),
    Graph("checkpoint inside forward",
          lambda: conv(lambda m, x: checkpoint(lambda x: m.bn(m.c(x)), x, use_reentrant=False)),
          images(), FOLDED),
    Graph("autograd.Function between",
          lambda: conv(lambda m, x: m.bn(_Scale.apply(m.c(x)))), images(), FOLDED),
    Graph("inference mode inside forward", lambda: conv(_inference), images(), FOLDED),
    Graph("no_grad inside forward", lambda: conv(_no_grad), images(), FOLDED),
    Graph("vmap inside forward",
          lambda: conv(lambda m, x: torch.vmap(lambda i: m.bn(m.c(i[None])))(x)), images(),
          {"bn": ""}),
    Graph("functional_call inside forward",
          lambda: conv(lambda m, x: m.bn(torch.func.functional_call(
              m.c, {"weight": m.c.weight * 2, "bias": m.c.bias}, (x,)))), images(),
          {"bn": "multiply-add"}),
    Graph("a wrapper around the model", lambda: _Wrapper(conv(lambda m, x: m.bn(m.c(x)))),
          images(), {"module.bn": "folded"}),
    Graph("LSTM, then linear and norm",
          lambda: Net(lambda m, x: m.bn(m.fc(m.rnn(x)[0]).transpose(1, 2)), bn=nn.BatchNorm1d(5),
                      rnn=nn.GRU(6, 4, batch_first=True), fc=nn.Linear(4, 5)),
          lambda: [normal(2, 7, 6), normal(3, 5, 6, seed=1)], FOLDED),
    Graph("transformer layer, then linear and norm",
          lambda: Net(lambda m, x: m.bn(m.fc(m.t(x)).transpose(1, 2)), bn=nn.BatchNorm1d(5),
                      t=nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
                      fc=nn.Linear(6, 5)),
          lambda: [normal(2, 7, 6), normal(3, 5, 6, seed=1)], FOLDED),
    Graph("norm before a transformer layer",
          lambda: Net(lambda m, x: m.t(m.bn(x.transpose(1, 2)).transpose(1, 2)),
                      bn=nn.BatchNorm1d(6),
                      t=nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)),
          lambda: [normal(2, 7, 6), normal(3, 5, 6, seed=1)], {"bn": "multiply-add"}),
    Graph("transformer block with batch norms in the place of layer norms",
          lambda: Net(_block, att=nn.MultiheadAttention(6, 2, batch_first=True), n1=Flat(6),
                      n2=Flat(6), f1=nn.Linear(6, 8), f2=nn.Linear(8, 6)),
          lambda: [normal(2, 7, 6), normal(3, 5, 6, seed=1)],
          {"n1": "left: custom-forward", "n2": "left: custom-forward"}),
    Graph("pre-norm attention with batch norms",
          lambda: Net(lambda m, x: x + _attend(m.att, m.bn(x)), bn=Flat(6),
                      att=nn.MultiheadAttention(6, 2, batch_first=True)),
          lambda: [normal(2, 7, 6), normal(3, 5, 6, seed=1)], FOLDED),
    Graph("random numbers in the forward",
          lambda: conv(lambda m, x: m.bn(m.c(x)) + torch.rand_like(x)), images(), FOLDED),
    Graph("random choice of channels",
          lambda: conv(lambda m, x: m.bn(m.c(x)[:, torch.randperm(3)])), images(),
          {"bn": "multiply-add"}),
    Graph("1-D speech: conv, norm, glu, depthwise conv, norm, silu, conv",
          lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 8, 1), nn.GLU(1),
                                nn.Conv1d(4, 4, 5, padding=2, groups=4), nn.BatchNorm1d(4),
                                nn.SiLU(), nn.Conv1d(4, 3, 1)), signals(),
          {"0": "folded", "4": "folded"}),
    Graph("multi-layer perceptron", lambda: nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(),
        nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4)), vectors(),
        {"0": "folded", "2": "folded", "6": "folded"}),
]  # fmt: skip


def _initialised(net: nn.Module) -> nn.Module:
    net.eval()(torch.zeros(1, 3, 8, 8))
    return net


def _scripted(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


def _mixed(net: Any) -> nn.Module:
    net.c.to(BF16)
    net.run = lambda m, x: m.bn(m.c(x).float())
    return net  # type: ignore[no-any-return] # Any in, Any out


def _double(net: Any) -> nn.Module:
    return net.double()  # type: ignore[no-any-return] # Any in, Any out


def _autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=BF16):
        out: Tensor = m.bn(m.c(x))
    return out.float()


def _chain(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = layer(x)
    return x


def _buffered() -> nn.Module:
    net = Net(lambda m, x: m.bn(F.conv2d(x, m.w, m.b)), bn=B2(3))
    net.register_buffer("w", normal(3, 3, 3, 3))
    net.register_buffer("b", normal(3))
    return net


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def _inference(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = m.bn(m.c(x))
    return y.clone() + 1


def _no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = m.c(x)
    out: Tensor = m.bn(x)
    return out


class _Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


def _attend(att: Any, x: Tensor) -> Tensor:
    out: Tensor = att(x, x, x, need_weights=False)[0]
    return out


def _block(m: Any, x: Tensor) -> Tensor:
    x = m.n1(x + _attend(m.att, x))
    out: Tensor = m.n2(x + m.f2(m.f1(x).relu()))
    return out
