"""ONNX: the norms of a graph, with their settings, by the nodes that compute them.

Read here and not by the onnx package, which takes the whole file into memory and as a tree of
objects: for a hostile file of 2-byte messages 60 times its size. Fields are looked at in place, as
far down as initializers and norms; nothing is run. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from normwise.interop.checkpoints.file import Region, open_file
from normwise.interop.checkpoints.grouping import NormPlan
from normwise.interop.checkpoints.limits import MB, NAME, RANK, TENSORS, is_size, numel, shown
from normwise.interop.checkpoints.neighbours import neighbour
from normwise.interop.checkpoints.protobuf import FOUR, LENGTH, VARINT, Field, Messages, varints
from normwise.interop.checkpoints.tensors import DTYPES, Stored, strides_of

__all__ = ["read_onnx"]

TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128",
    16: "bfloat16", 17: "float8_e4m3fn", 18: "float8_e4m3fnuz", 19: "float8_e5m2",
    20: "float8_e5m2fnuz", 24: "float8_e8m0fnu",
}  # fmt: skip
# TensorProto: fields that hold elements as they lie in memory, and as numbers of variable length.
RAW, FLOATS, DOUBLES, VARIABLE = 9, 4, 10, (5, 7, 11)
EXTERNAL = 1
VARIABLE_SIZE = 2 * MB  # each byte of which may become a Python integer of 36; shapes have some 10
# Operator: kind, and the role of each input from the second on.
NORMS = {
    "BatchNormalization": ("batch_norm", ("weight", "bias", "running_mean", "running_var")),
    "LayerNormalization": ("layer_norm", ("weight", "bias")),
    "GroupNormalization": ("group_norm", ("weight", "bias")),
    "InstanceNormalization": ("instance_norm", ("weight", "bias")),
    "RMSNormalization": ("rms_norm", ("weight",)),
}
EPS, MOMENTUM = 1e-5, 0.9  # of the standard, where a node does not say


@dataclass(frozen=True)
class Variable(Stored):
    """Elements as numbers of variable length; half precision's are their bits."""

    def load(self, name: str) -> Tensor:
        assert self.dtype is not None
        if self.region.size > VARIABLE_SIZE:
            self.region.refuse(
                f"{shown(name)} as {self.region.size} bytes of numbers of variable length",
                "raw data, as onnx.numpy_helper.from_array writes",
            )
        count = numel(self.shape)
        numbers = varints(self.region.read(), count)
        if len(numbers) != count:
            self.region.refuse(f"{shown(name)} with {len(numbers)} of its {count} elements")
        size = self.dtype.itemsize
        data = b"".join((n & (2 ** (8 * size) - 1)).to_bytes(size, "little") for n in numbers)
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        kind = torch.uint8 if self.dtype == torch.bool else self.dtype
        return torch.frombuffer(bytearray(data), dtype=kind).to(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Beside(Stored):
    """Elements in another file, which is opened when they are asked for."""

    location: str = ""
    start: int = 0

    def load(self, name: str) -> Tensor:
        file = open_file(neighbour(self.region.path, self.location))
        try:
            part = file.part(self.start, self.nbytes, f"the tensor {shown(name)}")
            inside = Stored(self.shape, self.dtype, part, self.strides)
            return inside.checked(name).load(name)
        finally:
            file.close()


@dataclass
class _Node:
    op: str = ""
    name: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    floats: dict[str, float] = field(default_factory=dict)
    value: tuple[int, int] | None = None  # where the tensor of a Constant lies


class _Graph:
    """What of a graph makes norms: initializers, constants, names for names, norm nodes."""

    def __init__(self, file: Region) -> None:
        self.file, self.wire = file, Messages(file)
        self.tensors: dict[str, Stored] = {}
        self.alias: dict[str, str] = {}
        self.nodes: list[_Node] = []

    def read(self) -> None:
        graphs = [f for f in self.wire.fields(0, self.file.size) if f.number == 7]
        if len(graphs) != 1 or graphs[0].wire != LENGTH:
            self.file.refuse("an ONNX file without its graph: not ONNX, cut short or damaged")
        for f in self.wire.fields(graphs[0].offset, graphs[0].size):
            if f.wire == LENGTH and f.number == 5:
                self._keep(*self._tensor(f.offset, f.size))
            elif f.wire == LENGTH and f.number == 1:
                self._node(f)

    def _keep(self, name: str, stored: Stored) -> None:
        if len(self.tensors) + len(self.alias) + len(self.nodes) > TENSORS:
            self.file.refuse(f"a graph of more than {TENSORS} tensors")
        self.tensors[name] = stored

    def _node(self, at: Field) -> None:
        node = _Node()
        attributes: list[Field] = []
        for f in self.wire.fields(at.offset, at.size):
            if f.wire != LENGTH:
                continue
            if f.number == 1 and len(node.inputs) < 8:
                node.inputs.append(self.wire.text(f))
            elif f.number == 2 and len(node.outputs) < 8:
                node.outputs.append(self.wire.text(f))
            elif f.number == 3:
                node.name = self.wire.text(f)
            elif f.number == 4:
                node.op = self.wire.text(f)
            elif f.number == 5 and len(attributes) < 32:
                attributes.append(f)
            elif f.number == 7:
                node.domain = self.wire.text(f)
        if node.domain not in ("", "ai.onnx") or not node.outputs:
            return
        if node.op in NORMS or node.op == "Constant":
            for f in attributes:
                self._attribute(node, f)
        if len(self.tensors) + len(self.alias) + len(self.nodes) > TENSORS:
            self.file.refuse(f"a graph of more than {TENSORS} tensors")
        if node.op in NORMS:
            self.nodes.append(node)
        elif node.op == "Identity" and node.inputs:
            self.alias[node.outputs[0]] = node.inputs[0]
        elif node.op == "Constant" and node.value is not None:
            self._keep(node.outputs[0], self._tensor(*node.value)[1])

    def _attribute(self, node: _Node, at: Field) -> None:
        name, number = "", None
        for f in self.wire.fields(at.offset, at.size):
            if f.number == 1 and f.wire == LENGTH:
                name = self.wire.text(f)
            elif f.number == 2 and f.wire == FOUR:
                (number,) = struct.unpack("<f", self.wire.bytes(f.offset, 4))
            elif f.number == 5 and f.wire == LENGTH and node.op == "Constant":
                node.value = f.offset, f.size
        if number is not None:
            # 1e-5 is not a float32: the shortest decimal that rounds to it is what was meant.
            node.floats[name] = float(f"{number:.7g}")

    def _tensor(self, offset: int, size: int) -> tuple[str, Stored]:
        name, code, where = "", 0, 0
        shape: list[int] = []
        data: Field | None = None
        external: dict[str, str] = {}
        for f in self.wire.fields(offset, size):
            if f.number == 1 and f.wire == VARINT:
                shape.append(f.value)
            elif f.number == 1 and f.wire == LENGTH:
                shape += varints(self.wire.bytes(f.offset, min(f.size, 1024)), RANK + 1)
            elif f.number == 2:
                code = f.value
            elif f.number == 8 and f.wire == LENGTH:
                name = self.wire.text(f)
            elif f.number in (RAW, FLOATS, DOUBLES, *VARIABLE) and f.wire == LENGTH:
                data = f if data is None or f.number == RAW else data
            elif f.number == 13 and f.wire == LENGTH:
                external.update(self._entry(f))
            elif f.number == 14:
                where = f.value
            if len(shape) > RANK:
                break
        dtype = DTYPES.get(TYPES.get(code, ""))
        strides = strides_of(tuple(shape))
        if where == EXTERNAL:
            return name, self._beside(name, tuple(shape), dtype, external)
        region = (
            self.file.part(data.offset, data.size, "a tensor") if data else self.file.part(0, 0, "")
        )
        stored = Stored(tuple(shape), dtype, region, strides)
        if data is not None and data.number in VARIABLE:
            # A number takes a byte at least; the check is that of a tensor of bytes.
            replace(stored, dtype=torch.uint8 if dtype else None).checked(name)
            return name, Variable(tuple(shape), dtype, region, strides)
        if data is not None and data.number != RAW:
            holds = {FLOATS: ("float32", "complex64"), DOUBLES: ("float64", "complex128")}
            if TYPES.get(code) not in holds[data.number]:
                self.file.refuse(f"{shown(name)} of type {code} in a field of another type")
        return name, stored.checked(name)

    def _entry(self, at: Field) -> Iterator[tuple[str, str]]:
        parts = {f.number: self.wire.text(f) for f in self.wire.fields(at.offset, at.size)}
        if 1 in parts and 2 in parts:
            yield parts[1], parts[2]

    def _beside(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, entry: dict[str, str]
    ) -> Beside:
        start = entry.get("offset", "0")
        plain = start.isascii() and start.isdigit() and len(start) < 19
        if not plain or len(name) > NAME or len(shape) > RANK or not all(map(is_size, shape)):
            self.file.refuse(f"{shown(name)} with sizes that are no sizes")
        made = Beside(
            shape,
            dtype,
            self.file,
            strides_of(shape),
            location=entry.get("location", ""),
            start=int(start),
        )
        if dtype is not None and entry.get("length", str(made.nbytes)) != str(made.nbytes):
            self.file.refuse(f"{shown(name)} of {made.nbytes} bytes in another number of them")
        neighbour(self.file.path, made.location)
        return made

    def resolve(self, name: str) -> str | None:
        """The initializer behind a name; exporters give equal tensors one, and Identity nodes."""
        for _ in range(8):
            if name in self.tensors:
                return name
            name = self.alias.get(name, "")
        return None


def _name(node: _Node, roles: dict[str, str]) -> str:
    """The layer's, if its tensors still have the names of a state dict; else the node's."""
    prefixes = {
        name.rpartition(".")[0] for role, name in roles.items() if name.endswith(f".{role}")
    }
    if len(prefixes) == 1:
        return prefixes.pop()
    return node.name or node.outputs[0]


def read_onnx(file: Region) -> tuple[dict[str, Stored], list[NormPlan]]:
    """The initializers and constants of the graph, and its norms; no tensor is read.

    ONNX keeps ``momentum`` of the old statistics; what is returned is torch's, of the new batch.
    """
    graph = _Graph(file)
    graph.read()
    plans: list[NormPlan] = []
    seen = set()
    for node in graph.nodes:
        kind, roles = NORMS[node.op]
        found = {
            role: name
            for role, given in zip(roles, node.inputs[1:], strict=False)
            if (name := graph.resolve(given)) is not None
        }
        whole = kind != "batch_norm" or {"running_mean", "running_var"} <= found.keys()
        key = (kind, *found.items())
        if found and whole and key not in seen:  # a layer that is called twice has two nodes
            seen.add(key)
            eps = node.floats.get("epsilon", EPS)
            momentum = round(1 - node.floats.get("momentum", MOMENTUM), 7)
            moves = kind == "batch_norm"
            plans.append(
                NormPlan(_name(node, found), kind, found, eps, momentum if moves else None)
            )
    return graph.tensors, plans
