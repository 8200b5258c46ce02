"""Norm, addition, activation: where a graph has them in a row, and one call in their place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normwise import functional as ours
from normwise.activations import parse
from normwise.nn import FrozenBatchNorm
from normwise.nn.batchnorm import _FusedBatchNorm

__all__ = [
    "Fusion", "activation_in", "addition_in", "find", "is_norm", "reader_of", "rewrite", "unhooked",
]  # fmt: skip

Modules = Mapping[str, nn.Module]

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
NORMS = (_FusedBatchNorm, FrozenBatchNorm)
FUNCTIONS = (F.batch_norm, ours.batch_norm)


def unhooked(module: nn.Module) -> bool:
    """Whether a call of ``module`` is its class's forward, and nobody looks on."""
    own = module.__dict__
    return (
        not any(own[h] for h in _HOOKS)
        and "forward" not in own
        and own.get("_compiled_call_impl") is None
    )


# -- activations ----------------------------------------------------------------------------------

_PLAIN: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", F.relu6: "relu6",
    F.hardswish: "hardswish", F.silu: "silu", torch.sigmoid: "sigmoid", torch.sigmoid_: "sigmoid",
    F.sigmoid: "sigmoid", torch.tanh: "tanh", torch.tanh_: "tanh", F.tanh: "tanh",
}  # fmt: skip
_METHODS = {
    "relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid", "tanh": "tanh",
    "tanh_": "tanh",
}  # fmt: skip
_CLASSES: dict[type, str] = {
    nn.ReLU: "relu", nn.Hardswish: "hardswish", nn.SiLU: "silu", nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}  # fmt: skip


def _leaky(slope: Any) -> str | None:
    if isinstance(slope, bool) or not isinstance(slope, (int, float)) or not slope > 0:
        return None
    return f"leaky_relu({float(slope)!r})"


def activation_of(module: nn.Module) -> str | None:
    """The activation that a module of torch.nn is, by the name under which a norm carries it."""
    kind = type(module)
    if kind in _CLASSES:
        return _CLASSES[kind]
    if kind is nn.ReLU6:
        own: Any = module
        return "relu6" if (own.min_val, own.max_val) == (0, 6) else None
    if kind is nn.LeakyReLU:
        return _leaky(module.negative_slope)
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else None
    return None


def activation_in(node: fx.Node, modules: Modules) -> str | None:
    """The activation that a call with one tensor is."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        fits = len(node.args) == 1 and not node.kwargs and unhooked(module)
        return activation_of(module) if fits else None
    if len(node.all_input_nodes) != 1:
        return None
    options = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
    given = node.args if "input" not in node.kwargs else (node.kwargs["input"], *node.args)
    if node.op == "call_method":
        return _METHODS.get(str(node.target)) if len(node.args) == 1 and not node.kwargs else None
    if node.op != "call_function":
        return None
    if node.target in _PLAIN:
        return _PLAIN[node.target] if not options and len(given) <= 2 else None
    if node.target is F.leaky_relu and len(given) <= 3:
        slope = given[1] if len(given) > 1 else options.pop("negative_slope", 0.01)
        return None if options else _leaky(slope)
    if node.target is F.gelu and len(given) == 1:
        plain = options.pop("approximate", "none") == "none"
        return "gelu" if plain and not options else None
    return None


# -- additions ------------------------------------------------------------------------------------

_ADDITIONS = (operator.add, torch.add, torch.Tensor.add)
_INTO = (operator.iadd, torch.Tensor.add_)


def addition_in(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """(left, right, whether left is written to) of a plain addition of two results."""
    function = node.op == "call_function"
    method = node.op == "call_method"
    into = (function and node.target in _INTO) or (method and node.target in ("add_", "__iadd__"))
    plain = (function and node.target in _ADDITIONS) or (method and node.target == "add")
    kwargs = dict(node.kwargs)
    if not (into or plain) or kwargs.pop("alpha", 1) != 1:
        return None
    operands = list(node.args)
    operands += [kwargs.pop(name) for name in ("input", "other") if name in kwargs]
    if kwargs or len(operands) != 2:
        return None
    left, right = operands
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or left is right:
        return None
    return left, right, into


# -- norms ----------------------------------------------------------------------------------------


def is_norm(node: fx.Node, modules: Modules) -> bool:
    """Whether a call is a norm that can take an activation and a residual."""
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        return (
            isinstance(module, NORMS)
            and len(node.args) == 1
            and not node.kwargs
            and module.activation is None
            and type(module).forward in (_FusedBatchNorm.forward, FrozenBatchNorm.forward)
            and unhooked(module)
        )
    if node.op != "call_function" or node.target not in FUNCTIONS:
        return False
    return not {"residual", "activation", "mask"} & node.kwargs.keys()


@dataclass
class Fusion:
    """``norm``, perhaps ``add`` of ``residual``, perhaps ``act``, to be one call."""

    norm: fx.Node
    add: fx.Node | None = None
    residual: fx.Node | None = None
    act: fx.Node | None = None
    activation: str | None = None
    skipped: tuple[fx.Node, ...] = ()
    """Calls between them that hand their argument through."""

    @property
    def last(self) -> fx.Node:
        found = self.act or self.add
        assert found is not None
        return found

    @property
    def parts(self) -> tuple[fx.Node, ...]:
        """All calls that go."""
        return tuple(n for n in (self.norm, *self.skipped, self.add, self.act) if n is not None)

    def text(self) -> str:
        """``'add + relu'``."""
        return " + ".join([*(["add"] if self.add else []), *([self.activation or ""])]).rstrip(" +")


def reader_of(node: fx.Node) -> fx.Node | None:
    """The one call that reads ``node``, if there is one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _hands_through(node: fx.Node, modules: Modules) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    module = modules[str(node.target)]
    return type(module) is nn.Identity and unhooked(module)


_MAKERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip
_MAKING = (
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.conv1d, torch.conv2d, torch.conv3d, F.linear, torch.matmul, operator.matmul, F.batch_norm,
)  # fmt: skip
_QUIET = (
    *_MAKERS, *NORMS, nn.modules.batchnorm._BatchNorm, nn.Identity, nn.MaxPool1d, nn.MaxPool2d,
    nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Upsample, nn.Flatten, nn.Sequential,
)  # fmt: skip


def _is_fresh(node: Any, modules: Modules) -> bool:
    """Whether nobody but its one reader can reach the memory of ``node``."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) in _MAKERS and unhooked(module)
    return node.op == "call_function" and node.target in _MAKING


def _is_quiet(node: fx.Node, modules: Modules) -> bool:
    """Whether a call is known to write to nothing that it is given."""
    if node.op == "call_module":
        return all(
            type(m) in _QUIET or (activation_of(m) is not None and not getattr(m, "inplace", False))
            for m in modules[str(node.target)].modules()
        )
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    if node.op in ("placeholder", "get_attr"):
        return True
    written = name.endswith("_") and not name.endswith("__")
    flags = [a for a in (*node.args, *node.kwargs.values()) if a is True]
    return not (written or flags or "out" in node.kwargs or name in _WRITING)


_WRITING = frozenset(f"i{n}" for n in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul",
    "lshift", "rshift",
)) | {"setitem", "__setitem__", "__iadd__"}  # fmt: skip
# Calls that change what later calls mean.
_REGIMES = ("set_grad_enabled", "autocast", "inference_mode", "saved_tensors", "functorch", "vmap")


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    found = []
    node = first.next
    while node is not last:
        found.append(node)
        node = node.next
    return found


def _tensors(module: nn.Module) -> set[int]:
    return {id(t) for t in (*module.parameters(), *module.buffers())}


def _touch(between: list[fx.Node], norm: fx.Node, x: Any, modules: Modules) -> bool:
    """Whether what lies between a norm and an addition may read or move the norm's own tensors."""
    if norm.op == "call_module":
        module = modules[str(norm.target)]
        own = _tensors(module)
        for node in between:
            if node.op == "call_module":
                other = modules[str(node.target)]
                if any(m is module for m in other.modules()) or own & _tensors(other):
                    return True

        def is_own(node: fx.Node) -> bool:
            if node.op != "get_attr":
                return False
            owner, _, name = str(node.target).rpartition(".")
            return id(getattr(modules.get(owner), name, None)) in own
    else:
        targets = {
            n.target if n.op == "get_attr" else n for n in norm.all_input_nodes if n is not x
        }

        def is_own(node: fx.Node) -> bool:
            return (node.target if node.op == "get_attr" else node) in targets

    # What is made of them, but by the norm itself: it may be a view.
    made: set[fx.Node] = set()
    for node in norm.graph.nodes:
        if node is not norm and (is_own(node) or not made.isdisjoint(node.all_input_nodes)):
            made.add(node)
    return any(not made.isdisjoint(n.all_input_nodes) for n in between)


def _may_wait(fusion: Fusion, modules: Modules) -> bool:
    """Whether the norm may run as late as the addition, and all in one regime."""
    for node in _between(fusion.norm, fusion.last):
        name = str(getattr(node.target, "__name__", node.target))
        if node.op == "call_function" and any(r in name for r in _REGIMES):
            return False
    if fusion.add is None:
        return True
    norm = fusion.norm
    between = [n for n in _between(norm, fusion.add) if n not in fusion.skipped]
    x = norm.args[0] if norm.args else norm.kwargs.get("input")
    if _touch(between, norm, x, modules):
        return False
    return _is_fresh(x, modules) or all(_is_quiet(n, modules) for n in between)


def find(graph: fx.Graph, modules: Modules) -> list[Fusion]:
    """The fusions of a graph. The later of two norms that meet in an addition takes it."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    claimed: set[fx.Node] = set()
    found = []
    for norm in reversed(list(graph.nodes)):
        if not is_norm(norm, modules):
            continue
        fusion = _from(norm, modules, claimed, order)
        if fusion is not None:
            claimed.update(fusion.parts)
            found.append(fusion)
    return found[::-1]


def _from(
    norm: fx.Node, modules: Modules, claimed: set[fx.Node], order: Mapping[fx.Node, int]
) -> Fusion | None:
    fusion = Fusion(norm)
    tail, skipped = norm, list[fx.Node]()
    while (node := reader_of(tail)) is not None and node not in claimed:
        if _hands_through(node, modules):
            skipped.append(node)
        elif (act := activation_in(node, modules)) is not None:
            fusion.act, fusion.activation = node, act
            break
        elif fusion.add is None and (operands := addition_in(node)) is not None:
            left, right, into = operands
            if into and left is not tail:
                break
            fusion.add, fusion.residual = node, right if left is tail else left
        else:
            break
        tail = node
    # What only hands through at the end stays.
    while fusion.act is None and skipped and skipped[-1] is tail:
        skipped.pop()
        tail = tail.args[0]  # type: ignore[assignment] # its one argument is a node
    fusion.skipped = tuple(skipped)
    if fusion.add is None and fusion.act is None:
        return None
    return fusion if _may_wait(fusion, modules) else None


# -- one call -------------------------------------------------------------------------------------


_ADD = (operator.add, operator.iadd)


def _fits(x: Tensor, residual: Any) -> bool:
    return isinstance(residual, Tensor) and residual.shape == x.shape and residual.dtype == x.dtype


def norm_add(
    norm: Callable[..., Tensor], x: Tensor, residual: Any, into: bool, activation: Any
) -> Any:
    """``activation(norm(x) + residual)``: one call where the shapes and dtypes are the same."""
    if _fits(x, residual):
        return norm(x, residual=residual, activation=activation)
    y = _ADD[into](norm(x), residual)
    return y if activation is None else parse(activation).value(y)


def function_norm(x: Tensor, *args: Any, activation: Any = None, **kwargs: Any) -> Any:
    """``activation(batch_norm(x))``, by the kernels where the tensor is on the CPU."""
    if x.device.type == "cpu":
        return ours.batch_norm(x, *args, activation=activation, **kwargs)
    y = F.batch_norm(x, *args, **kwargs)
    return y if activation is None else parse(activation).value(y)


def function_norm_add(
    x: Tensor, residual: Any, into: bool, activation: Any, *args: Any, **kwargs: Any
) -> Any:
    """``activation(batch_norm(x) + residual)``, as :func:`norm_add`."""
    if x.device.type == "cpu" and _fits(x, residual):
        return ours.batch_norm(x, *args, residual=residual, activation=activation, **kwargs)
    y = _ADD[into](function_norm(x, *args, **kwargs), residual)
    return y if activation is None else parse(activation).value(y)


def rewrite(graph: fx.Graph, fusion: Fusion) -> None:
    """Put one call in the place of a fusion's."""
    norm, act = fusion.norm, fusion.activation
    x = norm.args[0] if norm.args else norm.kwargs["input"]
    rest = norm.args[1:]
    options = {k: v for k, v in norm.kwargs.items() if k != "input"}
    if fusion.add is None:
        with graph.inserting_before(norm):
            if norm.op == "call_module":
                new = graph.call_module(str(norm.target), (x,), {"activation": act})
            else:
                new = graph.call_function(function_norm, (x, *rest), {"activation": act, **options})
    else:
        operands = addition_in(fusion.add)
        assert operands is not None
        left, right, into = operands
        residual = right if left in fusion.parts else left
        with graph.inserting_before(fusion.add):
            if norm.op == "call_module":
                module = graph.get_attr(str(norm.target))
                new = graph.call_function(norm_add, (module, x, residual, into, act))
            else:
                new = graph.call_function(
                    function_norm_add, (x, residual, into, act, *rest), dict(options)
                )
    new.meta = dict(fusion.last.meta)
    fusion.last.replace_all_uses_with(new)
    gone = set(fusion.parts)
    for node in reversed(graph.nodes):
        if node in gone:
            graph.erase_node(node)
