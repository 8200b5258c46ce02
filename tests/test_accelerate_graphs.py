"""``accelerate`` on small hard models: the same numbers as the model as written, always.

Each row is a model, perhaps something that is done to it afterwards, and what the report must say.
"""

from __future__ import annotations

import contextlib
import copy
import math
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise.tools.accelerate.classes import PLANS

B2 = nn.BatchNorm2d


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1, bias=False)


class Block(nn.Module):
    """``run(self, x)`` over two convolutions, two norms and a relu."""

    def __init__(self, **modules: Any) -> None:
        super().__init__()
        self.c, self.d, self.bn, self.b = conv(), conv(), B2(3), B2(3)
        self.relu = nn.ReLU()
        for name, module in modules.items():
            setattr(self, name, module)

    def extra(self, x: Tensor) -> Tensor:
        return x


def block(run: Callable[..., Any], **modules: Any) -> nn.Module:
    """A class of its own for each row, since it is the class's forward that is traced."""
    return type("Row", (Block,), {"forward": run})(**modules)


@dataclass(frozen=True)
class Row:
    """expect: norm -> 'fused: relu', 'swapped: reason'; after: what is done to either model."""

    name: str
    make: Callable[[], nn.Module]
    expect: dict[str, str] = field(default_factory=dict)
    after: Callable[[Any], Any] | None = None
    input: Callable[[], Any] = lambda: image()
    runs_fused: bool | None = None


def image(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randn(shape or (4, 3, 5, 6), generator=g, dtype=torch.float64) * 2 + 0.5


RELU = {"bn": "fused: relu"}
ADD_RELU = {"bn": "fused: add + relu"}

ACTIVATIONS = {
    "nn.ReLU": (nn.ReLU(), "relu"), "nn.ReLU in place": (nn.ReLU(inplace=True), "relu"),
    "nn.ReLU6": (nn.ReLU6(), "relu6"), "nn.LeakyReLU": (nn.LeakyReLU(0.2), "leaky_relu(0.2)"),
    "nn.Hardswish": (nn.Hardswish(), "hardswish"), "nn.SiLU": (nn.SiLU(inplace=True), "silu"),
    "nn.GELU": (nn.GELU(), "gelu"), "nn.Sigmoid": (nn.Sigmoid(), "sigmoid"),
    "nn.Tanh": (nn.Tanh(), "tanh"),
}  # fmt: skip
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "F.relu": (F.relu, "relu"), "F.relu in place": (lambda y: F.relu(y, True), "relu"),
    "F.relu inplace=": (lambda y: F.relu(y, inplace=True), "relu"),
    "F.relu_": (lambda y: F.relu_(y), "relu"), "torch.relu": (torch.relu, "relu"),
    "y.relu()": (lambda y: y.relu(), "relu"), "y.relu_()": (lambda y: y.relu_(), "relu"),
    "F.relu6": (F.relu6, "relu6"), "F.leaky_relu": (F.leaky_relu, "leaky_relu(0.01)"),
    "F.leaky_relu slope": (lambda y: F.leaky_relu(y, 0.3), "leaky_relu(0.3)"),
    "F.leaky_relu keyword": (
        lambda y: F.leaky_relu(y, negative_slope=0.3, inplace=True), "leaky_relu(0.3)"),
    "F.hardswish": (F.hardswish, "hardswish"), "F.silu": (F.silu, "silu"),
    "F.gelu": (F.gelu, "gelu"), "torch.sigmoid": (torch.sigmoid, "sigmoid"),
    "y.sigmoid()": (lambda y: y.sigmoid(), "sigmoid"), "y.tanh_()": (lambda y: y.tanh_(), "tanh"),
    "F.relu keyword": (lambda y: F.relu(input=y), "relu"),
}  # fmt: skip
NOT_CARRIED: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh-gelu": lambda y: F.gelu(y, approximate="tanh"),
    "leaky_relu upward": lambda y: F.leaky_relu(y, -0.5),
    "elu": F.elu, "hardtanh": lambda y: F.hardtanh(y, 0, 20), "swish": lambda y: y * y.sigmoid(),
    "softplus": F.softplus,
}  # fmt: skip


def added(y: Tensor, r: Tensor) -> Tensor:
    y += r
    return y


ADDITIONS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "y + r": lambda m, y, r: y + r, "r + y": lambda m, y, r: r + y,
    "y += r": lambda m, y, r: added(y, r), "torch.add": lambda m, y, r: torch.add(y, r),
    "torch.add alpha": lambda m, y, r: torch.add(r, y, alpha=1),
    "torch.add other": lambda m, y, r: torch.add(y, other=r),
    "y.add": lambda m, y, r: y.add(r), "y.add_": lambda m, y, r: y.add_(r),
    "operator.add": lambda m, y, r: operator.add(y, r),
    "operator.iadd": lambda m, y, r: operator.iadd(y, r),
}  # fmt: skip

FORMS = [
    *(Row(f"activation {name}", lambda a=a: nn.Sequential(conv(), B2(3), copy.deepcopy(a), conv()),
          {"1": f"fused: {text}"}) for name, (a, text) in ACTIVATIONS.items()),
    *(Row(f"activation {name}", lambda f=f: block(lambda m, x: f(m.bn(m.c(x)))),
          {"bn": f"fused: {text}"}) for name, (f, text) in CALLS.items()),
    *(Row(f"no activation {name}", lambda f=f: block(lambda m, x: f(m.bn(m.c(x)))),
          {"bn": "swapped: read-twice" if name == "swish" else "swapped: no-activation"})
      for name, f in NOT_CARRIED.items()),
    *(Row(f"addition {name}", lambda f=f: block(lambda m, x: m.d(F.relu(f(m, m.bn(m.c(x)), x)))),
          ADD_RELU) for name, f in ADDITIONS.items()),
    Row("only an addition", lambda: block(lambda m, x: m.d(m.bn(m.c(x)) + x)),
        {"bn": "fused: add"}),
    Row("an addition that is read twice",
        lambda: block(lambda m, x: m.d(F.relu(y := m.bn(m.c(x)) + x)) + y), {"bn": "fused: add"}),
    Row("two norms added", lambda: block(lambda m, x: F.silu(m.bn(m.c(x)) + m.b(m.d(x)))),
        {"bn": "swapped: is-residual", "b": "fused: add + silu"}),
    Row("Identity between",
        lambda: block(lambda m, x: m.relu(m.i(m.j(m.bn(m.c(x))) + x)), i=nn.Identity(),
                      j=nn.Identity()), ADD_RELU),
    Row("one relu in two places",
        lambda: block(lambda m, x: m.relu(m.b(m.d(m.relu(m.bn(m.c(x))))) + x)),
        {"bn": "fused: relu", "b": "fused: add + relu"}),
    Row("one norm in two places",
        lambda: block(lambda m, x: m.relu(m.bn(m.d(m.relu(m.bn(m.c(x))))))), RELU),
    Row("one norm twice, before one addition",
        lambda: block(lambda m, x: m.relu(m.bn(m.c(x)) + m.bn(m.d(x)))), {}),
    Row("a norm in two blocks", lambda: _shared_norm(), {"0.bn": "fused: relu"}),
    Row("a container inside", lambda: _Nested(), {
        "body.1": "fused: relu", "body.3.0.1": "fused: add + leaky_relu(0.01)"}),
    Row("an activation that begins the next container",
        lambda: nn.Sequential(nn.Sequential(conv(), B2(3)), nn.Sequential(nn.Tanh(), conv())),
        {"0.1": "fused: tanh"}),
    Row("the whole model is a norm and a relu", lambda: nn.Sequential(B2(3), nn.ReLU()),
        {"0": "fused: relu"}),
    Row("functional batch norm",
        lambda: block(lambda m, x: F.relu(F.batch_norm(
            m.c(x), m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias, m.training,
            0.2, 1e-3) + x)), {"": "fused: add + relu"}),
    Row("a norm class with an activation", lambda: nn.Sequential(conv(), _NormAct(3)),
        {"1": "fused: leaky_relu(0.01)"}),
    Row("a list of layers", lambda: _Walk(), {"norms.0": "fused: relu", "norms.1": "fused: relu"}),
    Row("a dense block", lambda: _Dense(), {"layers.a.bn": "fused: relu",
                                            "layers.b.bn": "fused: relu"}),
    Row("unpacked", lambda: block(_unpacked), RELU),
    Row("branches by attributes", lambda: block(_by_attribute, flag=True), RELU),
    Row("helpers of its own", lambda: block(lambda m, x: _helper(m, m.extra(m.c(x)))), RELU),
    Row("a method with keywords",
        lambda: block(lambda m, x, scale=2.0, shift=None: F.relu(m.bn(m.c(x))) * scale), RELU),
    Row("weights read by hand", lambda: block(
        lambda m, x: F.relu(m.bn(F.conv2d(x, m.c.weight * 2, padding=1)))), RELU),
]  # fmt: skip


class _NormAct(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                         self.training, 0.1, self.eps)  # fmt: skip
        return F.leaky_relu(y)


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Sequential(conv(), B2(3)))
        self.body = nn.Sequential(conv(), B2(3), nn.ReLU(), inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.body(x))


class _Walk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv(), conv()])
        self.norms = nn.ModuleDict({str(i): B2(3) for i in range(2)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = []
        for i, c in enumerate(self.convs):
            x = torch.relu(self.norms[str(i)](c(x)))
            found.append(x)
        return {"last": x, "sum": sum(found)}


class _DenseLayer(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.bn, self.conv = B2(c), nn.Conv2d(c, 3, 1)

    def forward(self, inputs: Tensor | list[Tensor]) -> Tensor:
        before = [inputs] if isinstance(inputs, Tensor) else inputs
        return self.conv(F.relu(self.bn(torch.cat(before, 1))))


class _Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a": _DenseLayer(3), "b": _DenseLayer(6)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers.values():
            features.append(layer(features))
        return torch.cat(features, 1)


def _shared_norm() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.relu(m.bn(m.c(x)))

    first, second = block(run), block(run)
    second.bn = first.bn
    return nn.Sequential(first, second)


def _unpacked(m: Any, x: Tensor) -> Tensor:
    a, b = m.relu(m.bn(m.c(x))).chunk(2, 2)
    return torch.cat([b, a], 2)


def _by_attribute(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.c(x))
    return m.relu(y) if m.flag else m.d(y)


def _helper(m: Any, y: Tensor) -> Tensor:
    return m.relu(m.bn(y))


# What must not be fused, or not be taken for a constant


def _twice(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.c(x))
    return F.relu(y) + y


def _relu_in_place_unread(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.c(x))
    F.relu_(y)
    return m.d(y)


def _added_into_the_other(m: Any, x: Tensor) -> Tensor:
    r = m.d(x)
    r += m.bn(m.c(x))
    return F.relu(r) + r


def _input_written_between(m: Any, x: Tensor) -> Tensor:
    z = m.d(x := x.detach())
    y = m.bn(z)
    z.mul_(3)
    return F.relu(y + x) + z


def _view_of_input_written(m: Any, x: Tensor) -> Tensor:
    z = m.d(x := x.detach())
    v = z[:, :1]
    y = m.bn(z)
    v.mul_(3)
    return F.relu(y + x)


def _statistics_read_between(m: Any, x: Tensor) -> Tensor:
    v = m.bn.running_mean.view(1, -1, 1, 1)
    y = m.bn(m.c(x))
    r = x + v
    return F.relu(y + r)


def _by_mode(m: Any, x: Tensor) -> Tensor:
    y = m.relu(m.bn(m.c(x)))
    return m.d(y) if m.training else y * 2


def _no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.relu(m.bn(m.c(x)))
    return m.d(y)


def _by_grad(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.bn(m.c(x)))
    return y * 2 if torch.is_grad_enabled() else y


def _by_values(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.bn(m.c(x)))
    return y if y.sum() > 1e9 else y * 2


def _by_shape(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.c(x))
    if x.shape[0] > 3:
        return y.tanh()
    return y.relu()


def _by_chance(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.bn(m.c(x)))
    return y * 2 if torch.rand(1).item() < 0.5 else y


def _by_python_chance(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.bn(m.c(x)))
    return y * random.random()


def _noise(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.c(x))) + torch.rand(3, 1, 1, dtype=torch.float64)


def _counting(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return F.relu(m.bn(m.c(x))) * m.calls


def _counting_in_a_dict(m: Any, x: Tensor) -> Tensor:
    m.calls["n"] += 1
    return F.relu(m.bn(m.c(x))) * m.calls["n"]


def _keeping(m: Any, x: Tensor) -> Tensor:
    m.last = F.relu(m.bn(m.c(x)))
    return m.last


KEPT: list[Tensor] = []
FACTOR = 2.0
SETTINGS = {"factor": 2.0}


def _keeping_in_a_global(m: Any, x: Tensor) -> Tensor:
    KEPT.append(m.bn(m.c(x)))
    return F.relu(KEPT.pop())


def _by_global(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.c(x))) * FACTOR


def _by_settings(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.c(x))) * SETTINGS["factor"]


def _checkpointed(m: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda x: F.relu(m.bn(m.c(x))), x, use_reentrant=False)


def _hooked_tensor(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.c(x))
    if y.requires_grad:
        y.register_hook(lambda g: g * 2)
    return F.relu(y)


class _Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


OBSTACLES = [
    Row("read twice", lambda: block(_twice), {"bn": "swapped: read-twice"}),
    Row("in place and read on", lambda: block(_relu_in_place_unread),
        {"bn": "swapped: read-twice"}),
    Row("added into the other", lambda: block(_added_into_the_other),
        {"bn": "swapped: order"}),
    Row("twice as much added", lambda: block(lambda m, x: torch.add(m.bn(x), x, alpha=2).relu()),
        {"bn": "swapped: no-activation"}),
    Row("a number added", lambda: block(lambda m, x: F.relu(m.bn(x) + 1)),
        {"bn": "swapped: no-activation"}),
    Row("added to itself", lambda: block(lambda m, x: F.relu((y := m.bn(x)) + y)),
        {"bn": "swapped: no-activation"}),
    Row("a row added", lambda: block(lambda m, x: F.relu(m.bn(m.c(x)) + x[:1])), ADD_RELU),
    Row("a wider residual", lambda: block(lambda m, x: F.relu(m.bn(m.c(x[:1])) + x)), ADD_RELU),
    Row("a scalar tensor added", lambda: block(lambda m, x: F.relu(m.bn(m.c(x)) + x.mean())),
        ADD_RELU),
    Row("a residual of another dtype",
        lambda: block(lambda m, x: F.relu(m.bn(m.c(x)) + x.float())), ADD_RELU),
    Row("integers added", lambda: block(lambda m, x: F.relu(m.bn(m.c(x)) + (x > 0).long())),
        ADD_RELU),
    Row("the input written between", lambda: block(_input_written_between).requires_grad_(False),
        {"bn": "swapped: order"}),
    Row("a view of the input written between",
        lambda: block(_view_of_input_written).requires_grad_(False),
        {"bn": "swapped: order"}),
    Row("the statistics read between", lambda: block(_statistics_read_between),
        {"bn": "swapped: order"}),
    Row("another way in training", lambda: block(_by_mode), RELU),
    Row("without gradients inside", lambda: block(_no_grad), {"bn": "swapped: state"}),
    Row("by the gradient mode", lambda: block(_by_grad), {"bn": "swapped: state"}),
    Row("by values", lambda: block(_by_values), {"bn": "swapped: control-flow"}),
    Row("by shapes", lambda: block(_by_shape), {"bn": "swapped: control-flow"}),
    Row("by chance", lambda: block(_by_chance), {"bn": "swapped: control-flow"}),
    Row("by Python's chance", lambda: block(_by_python_chance), {"bn": "swapped: state"}),
    Row("noise", lambda: block(_noise), RELU),
    Row("counts its calls", lambda: block(_counting, calls=0), {"bn": "swapped: state"}),
    Row("counts in a dict", lambda: block(_counting_in_a_dict, calls={"n": 0}),
        {"bn": "swapped: state"}),
    Row("keeps its output", lambda: block(_keeping), {"bn": "swapped: state"}),
    Row("keeps in a global", lambda: block(_keeping_in_a_global), {"bn": "swapped: state"}),
    Row("reads a number of the module", lambda: block(_by_global), RELU),
    Row("reads a dict of the module", lambda: block(_by_settings), {"bn": "swapped: state"}),
    Row("checkpointed", lambda: block(_checkpointed), {"bn": "swapped: state"}),
    Row("a hook on the tensor", lambda: block(_hooked_tensor), {"bn": "swapped: control-flow"}),
    Row("an autograd function between",
        lambda: block(lambda m, x: F.relu(_Doubling.apply(m.bn(m.c(x))))),
        {"bn": "swapped: state"}),
    Row("a decorated forward", lambda: block(torch.no_grad()(lambda m, x: F.relu(m.bn(x)))),
        {"bn": "swapped: state"}),
    Row("autocast inside", lambda: block(_autocast), {"bn": "swapped: state"}),
    Row("a dropout between", lambda: block(lambda m, x: F.relu(F.dropout(m.bn(x), 0.0))),
        {"bn": "swapped: no-activation"}),
    Row("a norm with an activation of its own",
        lambda: nn.Sequential(conv(), nw.nn.BatchNorm2d(3, activation="silu"), nn.ReLU()),
        {"1": "left: options"}),
    Row("frozen parameters", lambda: block(_helper).requires_grad_(False), RELU),
    Row("without affine parameters", lambda: block(_helper, bn=B2(3, affine=False)), RELU),
    Row("without statistics", lambda: block(_helper, bn=B2(3, track_running_stats=False)), RELU),
    Row("a cumulative average", lambda: block(_helper, bn=B2(3, momentum=None)), RELU),
]  # fmt: skip


def _autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.relu(m.bn(m.c(x)))


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def _setter(path: str, value: Any) -> Callable[[Any], Any]:
    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, copy.deepcopy(value))

    return change


def _monkeypatch(model: Any) -> None:
    class Other(type(model)):  # type: ignore[misc] # the class of the row
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.c(x)).tanh()

    model.__class__ = Other


def _relu_of(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.c(x)) + x)


# Done to both models after one of them was accelerated
# (what, whether something of it still runs fused: at the least the addition)
CHANGES: dict[str, tuple[Callable[[Any], Any], bool | None]] = {
    "nothing": (lambda m: None, True),
    "hook on the norm": (lambda m: m.bn.register_forward_hook(_double), False),
    "pre-hook on the norm": (lambda m: m.bn.register_forward_pre_hook(
        lambda mod, args: (args[0] * 2,)), False),
    "backward hook on the norm": (lambda m: m.bn.register_full_backward_hook(
        lambda mod, gi, go: (2 * gi[0],)), False),
    "hook on the relu": (lambda m: m.relu.register_forward_hook(_double), True),
    "pre-hook on the relu": (lambda m: m.relu.register_forward_pre_hook(
        lambda mod, args: (args[0] + 1,)), True),
    "hook on the model": (lambda m: m.register_forward_hook(_double), True),
    "hook on the convolution": (lambda m: m.c.register_forward_hook(_double), True),
    "another relu": (_setter("relu", nn.Tanh()), True),
    "another kind of norm": (_setter("bn", nn.Identity()), False),
    "another convolution": (_setter("c", nn.Conv2d(3, 3, 1).double()), True),
    "the norm is frozen": (lambda m: m.bn.eval(), True),
    "the norm's momentum": (_setter("bn.momentum", 0.5), True),
    "another class": (_monkeypatch, None),
    "a forward of the norm's own": (lambda m: setattr(m.bn, "forward", lambda x: x * 2), False),
    "a forward of the relu's own": (lambda m: setattr(m.relu, "forward", lambda x: x * 2), True),
}  # fmt: skip
LATER = [
    *(Row(f"then {name}", lambda: block(_relu_of), ADD_RELU, after, runs_fused=fused)
      for name, (after, fused) in CHANGES.items()),
    Row("then an attribute", lambda: block(_by_attribute, flag=True), RELU,
        _setter("flag", False), runs_fused=False),
    Row("then the slope", lambda: nn.Sequential(conv(), B2(3), nn.LeakyReLU(0.1)),
        {"1": "fused: leaky_relu(0.1)"}, _setter("2.negative_slope", 0.5), runs_fused=True),
    Row("then a layer more", lambda: nn.Sequential(conv(), B2(3), nn.ReLU()), {"1": "fused: relu"},
        lambda m: m.append(nn.Tanh()), runs_fused=True),
    Row("then a layer between", lambda: nn.Sequential(conv(), B2(3), nn.ReLU()),
        {"1": "fused: relu"}, lambda m: m.insert(2, nn.Softplus()), runs_fused=False),
    Row("then a hook on the container", _Nested, {"body.3.0.1": "fused: add + leaky_relu(0.01)"},
        lambda m: m.body[3][0].register_forward_hook(_double)),
    Row("then a list of its own", lambda: block(_by_list, factors=[2.0]), RELU,
        lambda m: m.factors.append(3.0), runs_fused=True),
    Row("then a hook on all modules", lambda: block(_relu_of), ADD_RELU),
]  # fmt: skip


def _by_list(m: Any, x: Tensor) -> Tensor:
    y = m.relu(m.bn(m.c(x)))
    for factor in m.factors:
        y = y * factor
    return y


ROWS = [*FORMS, *OBSTACLES, *LATER]


@torch.no_grad()
def learned(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(11)
    for module in model.modules():
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None and t.is_floating_point():
                noise = torch.randn(t.shape, generator=g, dtype=torch.float64)
                t.copy_(noise.abs() + 0.3 if "var" in name else noise * 0.5)
    return model.double()


def tensors(tree: Any) -> list[Tensor]:
    return list(tree.values()) if isinstance(tree, dict) else [tree]


def history(model: nn.Module, x: Tensor, after: Callable[[Any], Any] | None) -> list[Tensor]:
    """Outputs, gradients and state over three training steps and two evaluations."""
    if after is not None:
        after(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained or [nn.Parameter(torch.zeros(1))], lr=0.1)
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(1)
    random.seed(1)
    seen: list[Tensor] = []
    for training in (True, True, False, True):
        for module in model.modules():  # .train() would wake what was frozen
            if module is not getattr(model, "bn", None) or after is not CHANGES[
                "the norm is frozen"][0]:  # fmt: skip
                module.training = training
        given = x.clone().requires_grad_()
        results = tensors(model(given))
        optimizer.zero_grad()
        if any(y.requires_grad for y in results):
            cotangents = [torch.randn(y.shape, generator=g).to(y.dtype) for y in results]
            torch.autograd.backward(results, cotangents)
        seen += [y.detach().clone() for y in results]
        seen += [p.grad.clone() for p in trained if p.grad is not None]
        seen += [] if given.grad is None else [given.grad]
        optimizer.step()
    return seen + [t.clone() for t in model.state_dict().values()]


def ran_fused(model: nn.Module) -> bool:
    """Whether the last call of any module in the model was a fused one."""
    plans = [vars(m)[PLANS].plans for m in model.modules() if PLANS in vars(m)]
    return any(p[0].run is not None for p in plans if p)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_same_numbers(row: Row) -> None:
    model = learned(row.make())
    state = copy.deepcopy(model.state_dict())
    fast, report = nw.accelerate(model)
    told = {e.name: f"{e.action}: {e.into if e.action == 'fused' else e.reason}" for e in report}
    assert {name: told.get(name) for name in row.expect} == row.expect
    assert list(fast.state_dict()) == list(state)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True)
    )
    wanted = history(copy.deepcopy(model), row.input(), row.after)
    got = history(fast, row.input(), row.after)
    assert len(wanted) == len(got)
    for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
        assert a.dtype == b.dtype
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9, msg=lambda m, i=i: f"{i}: {m}")
    if row.runs_fused is not None:
        assert ran_fused(fast) == row.runs_fused


def test_names_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_a_number_of_the_module_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = nw.accelerate(learned(block(_by_global)))
    x = image()
    before = fast(x)
    monkeypatch.setitem(globals(), "FACTOR", math.e)
    assert torch.allclose(fast(x), before / 2 * math.e)


def test_hooks_on_all_modules_see_them_all() -> None:
    fast, _ = nw.accelerate(learned(block(_relu_of)))
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(handle.remove)
        fast(image())
    assert seen == [fast.c, fast.bn, fast.relu, fast]
