"""What must keep a norm from folding, and what only looks as if it did."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from fold_graphs.base import Graph, Net, images, normal, vectors

FOLDED = {"bn": "folded"}
B2 = nn.BatchNorm2d


def stays(reason: str) -> dict[str, str]:
    return {"bn": f"multiply-add: {reason}"}


def left(reason: str) -> dict[str, str]:
    return {"bn": f"left: {reason}"}


def conv(run: Any, **modules: Any) -> Net:
    """Both convolutions change nothing in the size, so that graphs can mix all they like."""
    own = {"c": nn.Conv2d(3, 3, 3, padding=1), "d": nn.Conv2d(3, 3, 3, padding=1), "bn": B2(3)}
    return Net(run, **{**own, **modules})


def shared(net: Any, name: str = "weight") -> Any:
    setattr(net.d, name, getattr(net.c, name))
    return net


SHARED = [
    Graph("one convolution called twice, one call before the norm",
          lambda: conv(lambda m, x: m.bn(m.c(x)) + m.c(x.tanh())), images(), stays("")),
    Graph("one convolution called twice, both before the norm",
          lambda: conv(lambda m, x: m.bn(m.c(x)) + m.bn(m.c(x.tanh())).relu()), images(), FOLDED),
    Graph("one convolution with two norms",
          lambda: conv(lambda m, x: m.bn(m.c(x)) + m.b(m.c(x)), b=B2(3)), images(),
          {"bn": "multiply-add", "b": "multiply-add"}),
    Graph("two norms on one output",
          lambda: conv(lambda m, x: m.bn(y := m.c(x)) * m.b(y), b=B2(3)), images(),
          {"bn": "multiply-add", "b": "multiply-add"}),
    Graph("one norm after two convolutions",
          lambda: conv(lambda m, x: m.bn(m.c(x)) * m.bn(m.d(x))), images(), FOLDED),
    Graph("one norm after a convolution and after nothing",
          lambda: conv(lambda m, x: m.bn(m.c(x)) * m.bn(x)), images(), {"bn": "multiply-add"}),
    Graph("two convolutions share their weight",
          lambda: shared(conv(lambda m, x: m.bn(m.c(x)) + m.d(x))), images(),
          stays("shared-weight")),
    Graph("two convolutions share their bias",
          lambda: shared(conv(lambda m, x: m.bn(m.c(x)) + m.d(x)), "bias"), images(),
          stays("shared-weight")),
    Graph("two convolutions' weights are views of one memory",
          lambda: conv(lambda m, x: m.bn(m.c(x)) + m.d(x)), images(), FOLDED,
          prepare=lambda m: _views(m)),
    Graph("a never called module shares the weight",
          lambda: shared(conv(lambda m, x: m.bn(m.c(x)))), images(), stays("shared-weight")),
    Graph("a penalty reads the weight",
          lambda: conv(lambda m, x: (m.bn(m.c(x)), m.c.weight.square().sum())), images(),
          stays("shared-weight")),
    Graph("the weight is an output", lambda: conv(lambda m, x: (m.bn(m.c(x)), m.c.weight)),
          images(), {"bn": "multiply-add"}),
    Graph("a bias is an output", lambda: conv(lambda m, x: {"y": m.bn(m.c(x)), "b": m.c.bias}),
          images(), {"bn": "multiply-add"}),
    Graph("the norm's weight is an output",
          lambda: conv(lambda m, x: (m.bn(m.c(x)), m.bn.weight)), images(), {"bn": "left"}),
    Graph("the norm's mean is read elsewhere",
          lambda: conv(lambda m, x: m.bn(m.c(x)) + m.bn.running_mean.sum()), images(),
          {"bn": "left"}),
    Graph("two norms share their parameters", lambda: _norms_sharing(), images(),
          {"bn": "folded", "b": "folded"}),
    Graph("one module at two paths", lambda: _two_paths(), images(), {"first.1": "folded"}),
    Graph("one block called twice",
          lambda: Net(lambda m, x: m.b(m.b(x)),
                      b=nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), B2(3), nn.ReLU())), images(),
          {"b.1": "folded"}),
    Graph("a loop over one block", lambda: conv(_loop), images(), FOLDED),
    Graph("a loop, the norm's output back into the convolution",
          lambda: conv(lambda m, x: m.bn(m.c(m.bn(m.c(x))))), images(), FOLDED),
    Graph("one zero-padded convolution after a norm, and elsewhere",
          lambda: conv(lambda m, x: m.c(m.bn(x)) + m.c(x)), images(), stays("")),
    Graph("one zero-padded convolution after two norms",
          lambda: conv(lambda m, x: m.c(m.bn(x)) + m.c(m.b(x)), b=B2(3)), images(),
          {"bn": "multiply-add", "b": "multiply-add"}),
    Graph("one zero-padded convolution twice after one norm",
          lambda: conv(lambda m, x: m.c(m.bn(x)) + m.c(m.bn(x.tanh()))), images(), FOLDED),
]  # fmt: skip

USED = [
    Graph("the convolution's output is returned too",
          lambda: conv(lambda m, x: (m.bn(y := m.c(x)), y)), images(), stays("")),
    Graph("the convolution's output is added to the norm's",
          lambda: conv(lambda m, x: m.bn(y := m.c(x)) + y), images(), stays("used-elsewhere")),
    Graph("the convolution's output is kept in an attribute",
          lambda: _Keeping(), images(), stays("is-output")),
    Graph("a view of the convolution's output is returned",
          lambda: conv(lambda m, x: (m.bn(y := m.c(x)), y.flatten(1)[:, :3])), images(),
          {"bn": "multiply-add"}),
    Graph("the detached output is returned",
          lambda: conv(lambda m, x: (m.bn(y := m.c(x)), y.detach())), images(),
          {"bn": "multiply-add"}),
    Graph("the output's .data is returned",
          lambda: conv(lambda m, x: (m.bn(y := m.c(x)), y.data)), images(),
          {"bn": "multiply-add"}),
    Graph("the mean of the output is returned",
          lambda: conv(lambda m, x: (m.bn(y := m.c(x)), y.mean())), images(),
          {"bn": "multiply-add"}),
    Graph("the norm's output is returned and read on",
          lambda: conv(lambda m, x: (y := m.bn(x), m.c(y))), images(), {"bn": "multiply-add"}),
    Graph("the norm reads a detached output", lambda: conv(lambda m, x: m.bn(m.c(x).detach())),
          images(), FOLDED),
    Graph("the norm reads the output's .data", lambda: conv(lambda m, x: m.bn(m.c(x).data)),
          images(), FOLDED),
    Graph("relu in place between", lambda: conv(lambda m, x: m.bn(F.relu_(m.c(x)))), images(),
          {"bn": "multiply-add"}),
    Graph("relu in place after the norm",
          lambda: nn.Sequential(nn.Conv2d(3, 4, 3), B2(4), nn.ReLU(inplace=True)), images(),
          {"1": "folded"}),
    Graph("the input is written after the norm read it, the output read later",
          lambda: conv(_written_input), images(), {"bn": "multiply-add"}),
    Graph("the convolution's output is written after the norm read it",
          lambda: conv(_written_output), images(), {"bn": "multiply-add"}),
    Graph("the norm's output is written, its input read later",
          lambda: conv(_written_norm), images(), {"bn": "multiply-add"}),
    Graph("a view of the convolution's output is written before the norm",
          lambda: conv(_written_view), images(), {"bn": "multiply-add"}),
    Graph("a view of the norm's output is written",
          lambda: conv(_written_slice), images(), FOLDED),
    Graph("added in place before the norm",
          lambda: conv(lambda m, x: m.bn(m.c(x).add_(1.0))), images(), FOLDED),
    Graph("the other branch added in place, then the norm", lambda: conv(_added_in_place),
          images(), FOLDED),
    Graph("setitem between", lambda: conv(_set_item), images(), {"bn": "multiply-add"}),
    Graph("written to a buffer given out=", lambda: conv(_out), images(), {"bn": "multiply-add"}),
    Graph("numpy between", lambda: conv(_numpy), images(), {"bn": "multiply-add"}),
    Graph("list of rows between", lambda: conv(
        lambda m, x: m.bn(torch.stack(list(m.c(x))))), images(), FOLDED),
    Graph("a complex side path",
          lambda: conv(lambda m, x: m.bn(m.c(x)) + torch.fft.ifft(torch.fft.fft(m.d(x))).real),
          images(), FOLDED),
    Graph("complex between",
          lambda: conv(lambda m, x: m.bn(torch.view_as_real(m.c(x) * 1j)[..., 1])), images(),
          {"bn": "multiply-add"}),
    Graph("weight applied to the norm's output by hand",
          lambda: conv(lambda m, x: torch.einsum("nchw,dc->ndhw", m.bn(x), m.c.weight[:, :, 1, 1])),
          images(), {"bn": "multiply-add"}),
]  # fmt: skip

WATCHED = [
    *(Graph(f"{kind} on the {where}", lambda k=kind, p=path: _hooked(k, p), images(), expect)
      for kind in ("forward hook", "forward pre-hook", "hook with kwargs", "backward hook",
                   "backward pre-hook")
      for where, path, expect in (("convolution", "c", {"bn": "multiply-add: hook"}),
                                  ("norm", "bn", {"bn": "left: hook"}))),
    Graph("hook on the whole model", lambda: _hooked("forward hook", ""), images(), FOLDED),
    Graph("hook on the module after the norm that changes its output",
          lambda: _doubling(), images(), {"1": "folded"}),
    Graph("hook on a container around convolution and norm",
          lambda: _container_hook(), images(), {"0.1": "folded"}),
    Graph("hook on a container that gives the convolution's output",
          lambda: _container_hook(inner=True), images(), {"1": "multiply-add: hook"}),
    Graph("state-dict hook on the convolution", lambda: _state_hook(), images(), FOLDED),
    Graph("hook that keeps the convolution's output",
          lambda: _capturing(), images(), stays("")),
    Graph("weight_norm, parametrized, on the convolution",
          lambda: conv(lambda m, x: m.bn(m.c(x)),
                       c=parametrizations.weight_norm(nn.Conv2d(3, 3, 3))), images(),
          stays("parametrized")),
    Graph("weight_norm, by a hook, on the convolution", lambda: _old_weight_norm(), images(),
          {"bn": "multiply-add"}),
    Graph("spectral_norm on the convolution",
          lambda: conv(lambda m, x: m.bn(m.c(x)),
                       c=parametrizations.spectral_norm(nn.Conv2d(3, 3, 3))), images(),
          stays("parametrized")),
    Graph("spectral_norm, by a hook, on the convolution",
          lambda: conv(lambda m, x: m.bn(m.c(x)),
                       c=nn.utils.spectral_norm(nn.Conv2d(3, 3, 3))), images(),
          {"bn": "multiply-add"}),
    Graph("spectral_norm on the convolution after the norm",
          lambda: conv(lambda m, x: m.c(m.bn(x)),
                       c=parametrizations.spectral_norm(nn.Conv2d(3, 3, 3))), images(),
          stays("parametrized")),
    Graph("symmetric weight, parametrized, of a linear layer",
          lambda: Net(lambda m, x: m.bn(m.fc(x)), fc=_symmetric(), bn=nn.BatchNorm1d(6)),
          vectors(), stays("parametrized")),
    Graph("parametrized bias of the convolution",
          lambda: conv(lambda m, x: m.bn(m.c(x)), c=_parametrized(nn.Conv2d(3, 3, 3), "bias")),
          images(), {"bn": "multiply-add"}),
    Graph("parametrized norm",
          lambda: conv(lambda m, x: m.bn(m.c(x)), bn=_parametrized(B2(3), "weight")), images(),
          left("parametrized")),
    Graph("orthogonal linear layer",
          lambda: Net(lambda m, x: m.bn(m.fc(x)), fc=parametrizations.orthogonal(nn.Linear(6, 6)),
                      bn=nn.BatchNorm1d(6)), vectors(), stays("parametrized"), tolerance=1e-3),
]  # fmt: skip

DATA = [
    *(Graph(f"the root branches on its input, example {'positive' if s > 0 else 'negative'}",
            lambda: conv(_branching), lambda s=s: _both_signs(s),
            {"bn": "multiply-add: dynamic"}) for s in (1, -1)),
    *(Graph(f"a sub-module branches, example {'positive' if s > 0 else 'negative'}",
            lambda: conv(lambda m, x: m.g(m.bn(m.c(x)) + 99 * x), g=_Gate()),
            lambda s=s: _both_signs(s),
            {"bn": "multiply-add", "g.bn": "multiply-add"} if s > 0 else
            {"bn": "multiply-add", "g.bn": "left: not-reached"}) for s in (1, -1)),
    *(Graph(f"a block inside branching code, example {'positive' if s > 0 else 'negative'}",
            lambda: Net(lambda m, x: m.b(x) if x.sum() > 0 else m.b(-x) * 2,
                        b=nn.Sequential(nn.Conv2d(3, 3, 3), B2(3))), lambda s=s: _both_signs(s),
            {"b.1": "folded"}) for s in (1, -1)),
    Graph("branching code that calls a block's convolution by itself",
          lambda: Net(lambda m, x: m.b(x) if x.sum() > 0 else m.b[0](x),
                      b=nn.Sequential(nn.Conv2d(3, 3, 3), B2(3))), lambda: _both_signs(1),
          {"b.1": "multiply-add"}),
    Graph("branching code that calls a deeper convolution by itself",
          lambda: Net(lambda m, x: m.o(x) if x.sum() > 0 else m.o.b[0](x).exp(),
                      o=Net(lambda m, x: m.b(x).relu(),
                            b=nn.Sequential(nn.Conv2d(3, 3, 3), B2(3)))),
          lambda: _both_signs(1), {"o.b.1": "multiply-add"}),
    Graph("the branch skips the norm",
          lambda: Net(lambda m, x: m.bn(m.c(x)) if float(x.mean()) > 0 else m.c(x),
                      c=nn.Conv2d(3, 3, 3), bn=B2(3)), lambda: _both_signs(1),
          stays("dynamic")),
    Graph("a branch by torch.equal",
          lambda: conv(lambda m, x: m.bn(m.c(x)) if torch.equal(x, x.abs()) else m.c(x)),
          lambda: [normal(2, 3, 6, 6).abs(), normal(2, 3, 6, 6)], stays("dynamic")),
    Graph("a branch by bool(any)",
          lambda: conv(lambda m, x: m.bn(m.c(x)) if (x > 0).all() else m.c(x)),
          lambda: [normal(2, 3, 6, 6).abs(), normal(2, 3, 6, 6)], stays("dynamic")),
    Graph("a branch by tolist",
          lambda: conv(lambda m, x: m.bn(m.c(x)) if x.flatten()[:1].tolist()[0] > 0 else m.c(x)),
          lambda: [normal(2, 3, 6, 6).abs(), -normal(2, 3, 6, 6).abs()], stays("dynamic")),
    Graph("a branch by numpy",
          lambda: conv(lambda m, x: m.bn(m.c(x)) if x.detach().numpy().min() > 0 else m.c(x)),
          lambda: [normal(2, 3, 6, 6).abs(), -normal(2, 3, 6, 6).abs()], stays("dynamic")),
    Graph("a choice by argmax of the data as an index of channels",
          lambda: conv(lambda m, x: m.bn(m.c(x)[:, m.pick(x)]), pick=_Pick()),
          lambda: [normal(2, 3, 6, 6, seed=i) for i in range(4)], {"bn": "multiply-add"}),
    Graph("a channel order in a buffer that every call moves on", lambda: _Rotating(), images(),
          {"bn": "multiply-add"}),
    Graph("a loop as often as the data say",
          lambda: conv(_data_loop), lambda: [normal(2, 3, 6, 6, seed=i) * 4**i for i in range(3)],
          {"bn": "multiply-add"}),
    Graph("a branch by the shape", lambda: conv(
        lambda m, x: m.bn(m.c(x)) if x.shape[0] > 0 else x), images(), FOLDED),
    Graph("a branch by a Python flag", lambda: conv(
        lambda m, x, skip=False: m.c(x) if skip else m.bn(m.c(x))),
        lambda: [normal(2, 3, 6, 6)], FOLDED),
    Graph("a norm that is never called",
          lambda: conv(lambda m, x: m.bn(m.c(x)), spare=B2(5)), images(),
          {"bn": "folded", "spare": "left: not-reached"}),
]  # fmt: skip


def _views(net: Any) -> None:
    both = torch.cat([net.c.weight.detach()] * 2)
    net.c.weight, net.d.weight = nn.Parameter(both[:3]), nn.Parameter(both[1:4])


def _norms_sharing() -> nn.Module:
    net = conv(lambda m, x: m.bn(m.c(x)) + m.b(m.d(x)), b=B2(3))
    net.b.weight, net.b.bias = net.bn.weight, net.bn.bias
    return net


def _two_paths() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), B2(3))
    return Net(lambda m, x: m.second(m.first(x)), first=block, second=block)


def _loop(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = m.bn(m.c(x)).relu() + x
    return x


class _Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.bn = nn.Conv2d(3, 4, 3), B2(4)
        self.features: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.features = self.c(x)
        return self.bn(self.features), self.features.sum()


def _written_input(m: Any, x: Tensor) -> Tensor:
    x = x * 2
    y = m.bn(x)
    x.mul_(3)
    out: Tensor = m.c(y) + x
    return out


def _written_output(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    z = m.bn(y)
    y.zero_()
    out: Tensor = z + y
    return out


def _written_norm(m: Any, x: Tensor) -> Any:
    x = x + 1
    y = m.bn(x)
    y.relu_()
    return m.c(y), x


def _written_view(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    y[:, 0].zero_()
    out: Tensor = m.bn(y)
    return out


def _written_slice(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.bn(m.c(x))
    y[:, :1].zero_()
    y.view(-1)[0] = 5.0
    return y


def _added_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    y += m.d(x)
    out: Tensor = m.bn(y)
    return out


def _set_item(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    y[:, :, 0] = 0
    out: Tensor = m.bn(y)
    return out


def _out(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    z = torch.empty_like(y)
    torch.mul(y.detach(), 2, out=z)
    out: Tensor = m.bn(z)
    return out


def _numpy(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.bn(torch.from_numpy(m.c(x).detach().numpy() * 2))
    return out


def _nothing(*args: Any) -> None:
    return None


def _hooked(kind: str, path: str) -> nn.Module:
    net = conv(lambda m, x: m.bn(m.c(x)).relu())
    module = net.get_submodule(path)
    if kind == "forward hook":
        module.register_forward_hook(_nothing)
    elif kind == "forward pre-hook":
        module.register_forward_pre_hook(_nothing)
    elif kind == "hook with kwargs":
        module.register_forward_hook(_nothing, with_kwargs=True)
    elif kind == "backward hook":
        module.register_full_backward_hook(_nothing)
    else:
        module.register_full_backward_pre_hook(_nothing)
    return net


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def _doubling() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), B2(4), nn.ReLU())
    net[2].register_forward_hook(_double)
    return net


def _container_hook(inner: bool = False) -> nn.Module:
    if inner:
        net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), B2(4))
    else:
        net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), B2(4)), nn.ReLU())
    net[0].register_forward_hook(_double)
    return net


def _state_hook() -> nn.Module:
    net = conv(lambda m, x: m.bn(m.c(x)))
    net.c.register_state_dict_post_hook(_nothing)
    return net


def _capturing() -> nn.Module:
    net = conv(lambda m, x: m.bn(m.c(x)))
    net.kept = []
    net.c.register_forward_hook(_Capture(net.kept))
    return net


class _Capture:
    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept[:] = [output.detach()]


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return conv(lambda m, x: m.bn(m.c(x)), c=weight_norm(nn.Conv2d(3, 3, 3)))


class _Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT if w.dim() == 2 else w.abs()


def _parametrized(module: nn.Module, name: str) -> nn.Module:
    nn.utils.parametrize.register_parametrization(module, name, _Symmetric())
    return module


def _symmetric() -> nn.Module:
    return _parametrized(nn.Linear(6, 6), "weight")


def _both_signs(first: int) -> list[Tensor]:
    x = normal(2, 3, 6, 6).abs()
    return [first * x, -first * x, first * 2 * normal(3, 3, 6, 6, seed=1).abs()]


def _branching(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.bn(m.c(x)) if x.sum() > 0 else m.bn(m.d(x)) - m.c(x)
    return out


class _Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.bn = nn.Conv2d(3, 3, 3, padding=1), B2(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.c(x)) if x.sum() > 0 else self.c(x)
        return y


class _Pick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((0, 2, 3)).argsort()


class _Rotating(nn.Module):
    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.c, self.bn = nn.Conv2d(3, 3, 3), B2(3)
        self.register_buffer("order", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.c(x)[:, self.order])
        self.order = self.order.roll(0)
        return y


def _data_loop(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        if x.norm() < 30:
            x = m.bn(m.c(x))
        else:
            x = m.c(x)
    return x
