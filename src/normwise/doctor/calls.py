"""What the recorded calls are: convolutions, linear layers, dropout; and their arguments."""

from __future__ import annotations

from typing import Any

from normwise.graph.record import Node, Value

__all__ = [
    "argument",
    "bias_of",
    "dropout_probability",
    "is_convolution",
    "is_linear",
    "padding_of",
]

_CONVOLUTIONS = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)


def is_convolution(node: Node) -> bool:
    return node.name in _CONVOLUTIONS


def is_linear(node: Node) -> bool:
    return node.name == "linear"


def argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by place or by name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def weight_of(node: Node) -> Value | None:
    """The weight of a convolution or a linear layer."""
    value = argument(node, 1, "weight")
    return value if isinstance(value, Value) else None


def bias_of(node: Node) -> Value | None:
    """The bias of a convolution or a linear layer, if it is a parameter."""
    value = argument(node, 2, "bias")
    return value if isinstance(value, Value) and value.origin == "parameter" else None


def padding_of(node: Node) -> int:
    """The zero padding of a convolution (the largest of its axes); 0 for a transposed one."""
    if not is_convolution(node) or "transpose" in node.name:
        return 0
    given = argument(node, 4, "padding", 0)
    if isinstance(given, str):
        weight = weight_of(node)
        sizes = () if weight is None else weight.shape[2:]
        return max((s // 2 for s in sizes), default=0) if given == "same" else 0
    return max(given, default=0) if isinstance(given, (tuple, list)) else int(given)


def dropout_probability(node: Node) -> float | None:
    """p of a dropout (of values or of channels; not alpha dropout, which keeps the variance)."""
    if "dropout" not in node.name or "alpha" in node.name:
        return None
    p = argument(node, 1, "p", 0.5)
    return float(p) if isinstance(p, (int, float)) else None
