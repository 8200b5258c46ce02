"""Who can take up a scale and a shift: convolutions, linear layers, embeddings, attention, norms.

A *taker* is one call of such an operation. ``outputs``: after it, by the rows of its weight;
``inputs``: before it, by the columns. All arithmetic is float64 on copies of the parameters, and
composes: a convolution between two batch norms takes up both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normwise.graph.modules import BORDERED
from normwise.graph.record import Node, Value
from normwise.graph.rules import argument

__all__ = ["Taker", "Weights", "taker_of"]

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
# Classes whose forward gives `self.bias` to the call: a bias can be put where there was none.
_TAKE_BIAS: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip


class Weights:
    """Float64 copies of the parameters that were changed, by the identity of the tensor.

    ``added`` are the biases that a module did not have, ``borders`` what its zero padding needs.
    """

    def __init__(self) -> None:
        self.changed: dict[int, tuple[Tensor, Tensor]] = {}
        self.added: dict[tuple[nn.Module, str], Tensor] = {}
        self.borders: dict[nn.Module, Tensor] = {}

    def of(self, parameter: Tensor) -> Tensor:
        entry = self.changed.get(id(parameter))
        return parameter.detach().double().cpu() if entry is None else entry[1]

    def set(self, parameter: Tensor, value: Tensor) -> None:
        self.changed[id(parameter)] = (parameter, value)

    def copy(self) -> Weights:
        other = Weights()
        other.changed, other.added = dict(self.changed), dict(self.added)
        other.borders = dict(self.borders)
        return other


@dataclass(eq=False)
class Taker:
    """One call that can take up a scale and a shift."""

    node: Node
    kind: str
    x: tuple[Value, ...]
    """What comes in, where a norm before it is taken up (query, key, value for attention)."""
    y: Value
    weight: Value
    bias: Value | None
    holder: nn.Module
    """The module that holds the weight."""
    weight_name: str
    bias_name: str | None
    """Where the bias is, or can be put; None if there is no place."""
    rank: int = 0
    transposed: bool = False
    groups: int = 1
    before: nn.Module | None = None
    """The module that holds what changes on the input side, where that is another one."""
    extra: tuple[Value, ...] = ()
    """Further parameters of the call that a change on the input side would concern."""

    @property
    def key(self) -> int:
        """The same for all calls with the same weights."""
        return id(self.weight.tensor)

    def owner(self, direction: str) -> nn.Module:
        """The module whose weights change when a norm goes ``'up'`` or ``'down'`` into the call."""
        return self.before or self.holder if direction == "down" else self.holder

    @property
    def output_axis(self) -> int:
        return len(self.y.shape) - 1 - self.rank

    def input_axis(self, x: Value) -> int:
        return len(x.shape) - 1 - self.rank

    @property
    def out_channels(self) -> int:
        return self.y.shape[self.output_axis]

    def parameters(self) -> list[Tensor]:
        values = (self.weight, self.bias, *self.extra)
        return [v.tensor for v in values if v is not None and v.tensor is not None]

    def _weight(self) -> Tensor:
        assert self.weight.tensor is not None
        return self.weight.tensor

    def _add_to_bias(self, weights: Weights, shift: Tensor, scale: Tensor | None = None) -> bool:
        """bias * scale + shift. False if there is no bias and no place for one."""
        key = (self.holder, self.bias_name or "")
        if self.bias is not None:
            assert self.bias.tensor is not None
            old = weights.of(self.bias.tensor)
            weights.set(self.bias.tensor, (old if scale is None else old * scale) + shift)
            return True
        if key in weights.added:
            old = weights.added[key]
            weights.added[key] = (old if scale is None else old * scale) + shift
            return True
        if not bool(shift.any()):
            return True
        if self.bias_name is None:
            return False
        weights.added[key] = shift.clone()
        return True

    @property
    def takes_shift(self) -> bool:
        return self.bias is not None or self.bias_name is not None or self.kind == "embedding"

    # -- on the output side -----------------------------------------------------------------------

    def scale_outputs(self, weights: Weights, scale: Tensor, shift: Tensor) -> bool:
        """y becomes scale * y + shift, by output channel. False if there is no place for it."""
        parameter = self._weight()
        w = weights.of(parameter)
        if self.kind == "embedding":
            weights.set(parameter, w * scale + shift)
            return True
        if self.transposed:
            grouped = w.unflatten(0, (self.groups, -1))
            factor = scale.view(self.groups, 1, -1, *(1,) * self.rank)
            w = (grouped * factor).flatten(0, 1)
        else:
            w = w * scale.view(-1, *(1,) * (w.dim() - 1))
        weights.set(parameter, w)
        border = weights.borders.get(self.holder)
        if border is not None:
            axis = 1 if self.transposed else 0
            shape = [1] * border.dim()
            shape[axis] = -1
            weights.borders[self.holder] = border * scale.view(shape)
        return self._add_to_bias(weights, shift, scale)

    # -- on the input side ------------------------------------------------------------------------

    def border_matters(self) -> bool:
        """Whether a shift of the input reaches the border otherwise than the inside."""
        if not self.rank:
            return False
        node = self.node
        if not self.transposed:
            padding = argument(node, 4, "padding", 0)
            if isinstance(padding, str):
                return padding == "same" and any(k > 1 for k in self._weight().shape[2:])
            return _any(padding, lambda n: n != 0)
        kernel = self._weight().shape[2:]
        stride = _each(argument(node, 3, "stride", 1), self.rank)
        return (
            tuple(kernel) != stride
            or _any(argument(node, 4, "padding", 0), lambda n: n != 0)
            or _any(argument(node, 5, "output_padding", 0), lambda n: n != 0)
            or _any(argument(node, 7, "dilation", 1), lambda n: n != 1)
        )

    def scale_inputs(self, weights: Weights, index: int, scale: Tensor, shift: Tensor) -> bool:
        """The call on ``scale * x + shift`` becomes a call on x. False if it cannot."""
        parameter = self._weight()
        w = weights.of(parameter)
        if self.kind == "attention":
            return self._scale_attention(weights, index, scale, shift)
        if self.kind == "linear":
            weights.set(parameter, w * scale)
            return self._add_to_bias(weights, w @ shift)
        if self.transposed:
            factor = scale.view(-1, *(1,) * (w.dim() - 1))
            # (groups, in / groups, out / groups, *k), summed over the input channels
            mixed = (w * shift.view_as(factor)).unflatten(0, (self.groups, -1)).sum(1).flatten(0, 1)
            w_new = w * factor
        else:
            view = (self.groups, 1, -1, *(1,) * self.rank)
            grouped = w.unflatten(0, (self.groups, -1))
            w_new = (grouped * scale.view(view)).flatten(0, 1)
            mixed = (grouped * shift.view(view)).flatten(0, 1).sum(1)
        weights.set(parameter, w_new)
        if not bool(shift.any()):
            return True
        if not self.border_matters():
            if self.transposed:  # kernel = stride: each output sees one position of the kernel
                flat = mixed.flatten(1)
                if not torch.allclose(flat, flat[:, :1].expand_as(flat), rtol=1e-12, atol=0):
                    return self._add_border(weights, mixed)
                return self._add_to_bias(weights, flat[:, 0])
            return self._add_to_bias(weights, mixed.flatten(1).sum(1))
        return self._add_border(weights, mixed)

    def _add_border(self, weights: Weights, mixed: Tensor) -> bool:
        """mixed: (out channels, *kernel)."""
        if type(self.holder) not in BORDERED or self.holder in weights.borders:
            return False
        if getattr(self.holder, "padding_mode", "zeros") != "zeros":
            return False
        weights.borders[self.holder] = mixed.unsqueeze(0 if self.transposed else 1)
        return True

    def _scale_attention(self, weights: Weights, index: int, scale: Tensor, shift: Tensor) -> bool:
        packed, bias = self.extra[0], self.extra[1] if len(self.extra) > 1 else None
        assert packed.tensor is not None
        w = weights.of(packed.tensor)
        width = w.shape[1]
        rows = slice(index * width, (index + 1) * width)
        old = w[rows]
        new = w.clone()
        new[rows] = old * scale
        weights.set(packed.tensor, new)
        delta = torch.zeros(3 * width, dtype=torch.float64)
        delta[rows] = old @ shift
        if bias is not None:
            assert bias.tensor is not None
            weights.set(bias.tensor, weights.of(bias.tensor) + delta)
            return True
        return not bool(delta.any())


def _any(number: Any, test: Callable[[Any], bool]) -> bool:
    return any(test(n) for n in (number if isinstance(number, (tuple, list)) else (number,)))


def _each(number: Any, rank: int) -> tuple[int, ...]:
    return tuple(number) if isinstance(number, (tuple, list)) else (number,) * rank


def _plain(value: Any) -> bool:
    """A parameter or buffer of real numbers, of no subclass that keeps them in another form."""
    if not isinstance(value, Value) or value.tensor is None:
        return False
    t = value.tensor
    return type(t) in (Tensor, nn.Parameter, nn.Buffer) and t.is_floating_point()


Owners = Callable[[Tensor], "list[tuple[nn.Module, str]]"]


def _bias_place(owner: nn.Module, bias: Value | None) -> str | None:
    if bias is not None:
        return "bias"
    own = type(owner)
    known = any(own.forward is base.forward for base in _TAKE_BIAS if isinstance(owner, base))
    inner = getattr(own, "_conv_forward", None)
    plain = inner is None or any(
        inner is getattr(base, "_conv_forward", None) for base in _TAKE_BIAS
        if isinstance(owner, base)
    )  # fmt: skip
    empty = "bias" in owner._parameters and owner._parameters["bias"] is None
    return "bias" if known and plain and empty else None


def taker_of(node: Node, owners: Owners) -> Taker | None:
    """``node`` as one that can take up a scale and a shift, with parameters of its own."""
    name = node.name
    if not node.outputs or node.writes:
        return None
    if name in ("multi_head_attention_forward",):
        return _attention(node, owners)
    if name in _CONVOLUTIONS or name in _TRANSPOSED or name == "linear":
        x, weight, bias = (argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
        rank = _CONVOLUTIONS.get(name, _TRANSPOSED.get(name, 0))
        transposed = name in _TRANSPOSED
        groups = argument(node, 6, "groups", 1) if rank else 1
        kind = "convolution" if rank else "linear"
    elif name == "embedding":
        x, weight, bias = argument(node, 0, "input"), argument(node, 1, "weight"), None
        # max_norm rescales rows of the weight in the call, by their norms.
        if argument(node, 3, "max_norm") is not None:
            return None
        rank, transposed, groups, kind = 0, False, 1, "embedding"
    else:
        return None
    if not isinstance(x, Value) or not _plain(weight):
        return None
    if bias is not None and not _plain(bias):
        return None
    places = owners(weight.tensor)
    if len(places) != 1 or (kind == "linear" and len(weight.shape) != 2):
        return None
    owner, weight_name = places[0]
    return Taker(
        node, kind, (x,) if kind != "embedding" else (), node.outputs[0], weight, bias, owner,
        weight_name, _bias_place(owner, bias), rank, transposed, groups,
    )  # fmt: skip


def _attention(node: Node, owners: Owners) -> Taker | None:
    """torch.nn.MultiheadAttention: the projection after it, and the packed one before it."""
    weight = argument(node, 11, "out_proj_weight")
    bias = argument(node, 12, "out_proj_bias")
    packed = argument(node, 5, "in_proj_weight")
    packed_bias = argument(node, 6, "in_proj_bias")
    if not _plain(weight) or len(owners(weight.tensor)) != 1:
        return None
    if bias is not None and not _plain(bias):
        return None
    inputs = tuple(v for v in node.args[:3] if isinstance(v, Value))
    before = _plain(packed) and len(inputs) == 3 and (packed_bias is None or _plain(packed_bias))
    extra = tuple(v for v in (packed, packed_bias) if _plain(v))
    owner, name = owners(weight.tensor)[0]
    holders = owners(extra[0].tensor) if before and extra[0].tensor is not None else []
    return Taker(
        node, "attention", inputs if before else (), node.outputs[0], weight, bias, owner, name,
        "bias" if bias is not None else None, before=holders[0][0] if holders else None,
        extra=extra if before else (),
    )  # fmt: skip
