"""Calls that commute with a scale and a shift for each channel, and how to run them on labels.

linear: f(x + y) = f(x) + f(y), so a scale passes through wherever it does not meet another one.
That a shift passes too (the weights of an average sum to one) is found by running the call on it.
positive: only a scale above zero passes (max pooling); 'relu': and no shift passes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from normwise.graph.record import Node, Value

__all__ = ["SUMS", "Kind", "kind", "run"]

Kind = Literal["linear", "positive", "relu"]

_CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as"})
_MOVES = _CASTS | frozenset(
    {
        "view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel", "permute",
        "transpose", "transpose_", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "get:T",
        "get:mT", "get:data", "adjoint", "squeeze", "squeeze_", "unsqueeze", "unsqueeze_",
        "contiguous", "clone", "expand", "expand_as", "broadcast_to", "chunk", "split",
        "split_with_sizes", "tensor_split", "hsplit", "vsplit", "unbind", "narrow", "select",
        "index_select", "__getitem__", "cat", "concat", "concatenate", "stack", "hstack", "vstack",
        "flip", "roll", "repeat", "tile", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle",
        "channel_shuffle", "native_channel_shuffle", "detach", "alias", "positive", "unfold",
        "atleast_3d",
    }
)  # fmt: skip
_AVERAGES = frozenset(
    {
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate",
        "upsample", "upsample_nearest", "upsample_bilinear", "upsample_nearest1d",
        "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "mean",
    }
)  # fmt: skip
_POOLS = frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d"})
_DROPOUTS = frozenset(
    {
        "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
        "alpha_dropout_", "feature_dropout", "feature_dropout_", "feature_alpha_dropout",
        "feature_alpha_dropout_",
    }
)  # fmt: skip
SUMS = frozenset(
    {
        "add", "add_", "sub", "sub_", "subtract", "rsub", "__add__", "__radd__", "__iadd__",
        "__sub__", "__rsub__", "__isub__",
    }
)  # fmt: skip
_PRODUCTS = frozenset(
    {
        "mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__", "div", "div_", "divide",
        "true_divide", "__truediv__", "__div__", "__itruediv__", "__idiv__", "neg", "negative",
        "neg_", "__neg__",
    }
)  # fmt: skip
_MAXIMA = frozenset(
    {
        "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
        "adaptive_max_pool3d", "amax",
    }
)  # fmt: skip
_RELUS = frozenset({"relu", "relu_", "leaky_relu", "leaky_relu_"})


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def _all(number: Any, value: int) -> bool:
    return all(n == value for n in tree_leaves(number))


def _average_without_border(node: Node) -> bool:
    """Zeros at the border are averaged too, if they count: no shift passes, and whether one does
    at the size of the example says nothing of other sizes."""
    padding = argument(node, 3, "padding", 0)
    counted = argument(node, 5, "count_include_pad", True)
    divisor = argument(node, 6, "divisor_override", None)
    return (_all(padding, 0) or not counted) and divisor is None


def _one_operand(node: Node) -> bool:
    operands = node.args[:2]
    numbers = [o for o in operands[1:] if isinstance(o, (int, float))]
    return (
        isinstance(operands[0], Value)
        and len(numbers) == len(operands) - 1
        and not isinstance(node.kwargs.get("other"), Value)
        and node.kwargs.get("rounding_mode") is None
        and all(n != 0 for n in numbers)
    )


def kind(node: Node) -> Kind | None:
    """How ``node`` treats a scale and a shift; None if nothing is known that commutes."""
    name = node.name
    if node.kwargs.get("out") is not None:
        return None
    if name in _MOVES:
        # An index that was computed may be another one on other inputs.
        indices = (v for v in node.inputs if not v.dtype.is_floating_point)
        return "linear" if all(v.constant is not None for v in indices) else None
    if name in _AVERAGES:
        return "linear" if node.kwargs.get("dtype") is None else None
    if name in _POOLS:
        return "linear" if _average_without_border(node) else None
    if name in _DROPOUTS:
        training = argument(node, 2, "training", node.kwargs.get("train", True))
        return None if training else "linear"
    if name == "pad":
        reflects = argument(node, 2, "mode", "constant") != "constant"
        crops = all(n <= 0 for n in tree_leaves(argument(node, 1, "pad", 0)))
        return "linear" if reflects or crops else None
    if name in SUMS:
        return "linear"
    if name in _PRODUCTS:
        return "linear" if _one_operand(node) else None
    if name in _MAXIMA:
        return "positive" if len(node.outputs) == 1 else None
    return "relu" if name in _RELUS else None


def run(node: Node, values: dict[Value, Tensor]) -> list[Tensor] | None:
    """The results of ``node`` in float64 on ``values``; what is not among them counts as 0.

    None where a maximum meets different labels, so that it depends on the data which one passes.
    """

    def given(v: Value) -> Tensor:
        if v in values:
            t = values[v]
            return t.clone() if node.writes else t
        if v.constant is not None:
            return v.constant.cpu()
        return torch.zeros(v.shape, dtype=torch.float64)

    if node.name in _CASTS or node.name in _RELUS or node.name in _DROPOUTS:
        return [given(node.inputs[0])]
    args, kwargs = tree_map_only(Value, given, (node.args, node.kwargs))
    if node.name in _MAXIMA:
        highest = node.func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        rest = tree_map_only(Tensor, torch.neg, (args, kwargs)) if x is not None else None
        assert rest is not None
        lowest = -node.func(*rest[0], **rest[1])
        return [highest] if torch.equal(highest, lowest) else None
    result = node.func(*args, **kwargs)
    made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    if node.writes and not made:
        made = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)][:1]
    return made
