"""A small model in every format that normwise reads, made in memory by the formats' own writers."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import onnx
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

State = dict[str, Tensor]
ROLES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def network(seed: int = 0) -> nn.Sequential:
    """Two batch norms of different sizes, no tensor as it was initialised."""
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7)
    )
    for t in net.state_dict().values():
        t.copy_(
            torch.rand(t.shape, generator=g) + 0.5 if t.is_floating_point() else torch.tensor(9)
        )
    return net


def state(seed: int = 0) -> State:
    return {name: t.clone() for name, t in network(seed).state_dict().items()}


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def legacy(value: Any) -> bytes:
    return saved(value, _use_new_zipfile_serialization=False)


def torchscript(model: nn.Module) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # readers outlive writers
        torch.jit.save(torch.jit.script(model), file)
    return file.getvalue()


def zipped(entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return file.getvalue()


def unzipped(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_pickle(pickled: bytes, data: bytes | None = None) -> bytes:
    """A file of torch.save with another ``data.pkl``."""
    entries = unzipped(saved(state()) if data is None else data)
    return zipped({n: pickled if n.endswith("/data.pkl") else d for n, d in entries.items()})


def safe(tensors: State, metadata: dict[str, str] | None = None) -> bytes:
    return safetensors.torch.save(tensors, metadata)


def safe_of(header: Any, body: bytes = b"") -> bytes:
    """A safetensors file by hand: whatever the header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def exported(tensors: State, version: str = "0", changes: Mapping[str, Any] | None = None) -> bytes:
    """The layout of torch.export.save, without the four seconds that an export takes."""
    codes = {torch.float32: 7, torch.int64: 5, torch.float16: 6}
    config, entries = {}, {}
    for i, (name, t) in enumerate(tensors.items()):
        config[name] = {
            "path_name": f"weight_{i}", "is_param": True, "use_pickle": False,
            "tensor_meta": {
                "dtype": codes[t.dtype], "sizes": [{"as_int": n} for n in t.shape],
                "strides": [{"as_int": n} for n in t.stride()], "storage_offset": {"as_int": 0},
                "device": {"type": "cpu", "index": None}, "requires_grad": True, "layout": 7,
            },
            **(changes or {}),
        }  # fmt: skip
        entries[f"n/data/weights/weight_{i}"] = t.numpy().tobytes()
    entries["n/data/weights/model_weights_config.json"] = json.dumps({"config": config}).encode()
    entries["n/models/model.json"] = json.dumps(_program(tensors)).encode()
    entries |= {"n/archive_format": b"pt2", "n/archive_version": version.encode(),
                "n/byteorder": b"little"}  # fmt: skip
    return zipped(entries)


def _program(tensors: State) -> dict[str, Any]:
    means = [name for name in tensors if name.endswith("running_mean")]
    specs = [{"buffer": {"arg": {"name": f"b{i}"}, "buffer_name": m}} for i, m in enumerate(means)]
    nodes = [
        {"target": "torch.ops.aten.batch_norm.default", "inputs": [
            {"name": "running_mean", "arg": {"as_tensor": {"name": f"b{i}"}}},
            {"name": "momentum", "arg": {"as_float": 0.2}},
            {"name": "eps", "arg": {"as_float": 1e-3}},
        ]}
        for i in range(len(means))
    ]  # fmt: skip
    return {"graph_module": {"graph": {"nodes": nodes}, "signature": {"input_specs": specs}}}


def norm_node(prefix: str, x: str, y: str, **attributes: Any) -> onnx.NodeProto:
    names = [f"{prefix}.{role}" for role in ROLES[:4]]
    return helper.make_node("BatchNormalization", [x, *names], [y], name=f"/{prefix}", **attributes)


def model_of(nodes: list[onnx.NodeProto], tensors: Iterable[onnx.TensorProto]) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], list(tensors))
    return helper.make_model(graph)


def initializers(tensors: State) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(t.numpy(), name) for name, t in tensors.items()]


def onnx_model(tensors: State) -> onnx.ModelProto:
    tensors = {name: t for name, t in tensors.items() if "tracked" not in name}
    nodes = [
        helper.make_node("Conv", ["x", "0.weight", "0.bias"], ["a"]),
        norm_node("1", "a", "b", epsilon=1e-3, momentum=0.8),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "3.weight", "3.bias"], ["d"]),
        norm_node("4", "d", "y"),
    ]
    return model_of(nodes, initializers(tensors))


def onnx_bytes(tensors: State) -> bytes:
    data: bytes = onnx_model(tensors).SerializeToString()
    return data


def index(places: Mapping[str, Any]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": places}).encode()


def files() -> dict[str, bytes]:
    """By file name."""
    tensors = state()
    return {
        "net.safetensors": safe(tensors),
        "net.pt": saved(tensors),
        "nested.pth": saved({"state_dict": tensors, "optimizer": {"lr": 0.1}, "epoch": 3}),
        "legacy.pt": legacy(tensors),
        "script.pt": torchscript(network()),
        "net.pt2": exported(tensors),
        "old.pt2": zipped({"serialized_exported_program.json": b"{}",
                           "serialized_state_dict.pt": saved(tensors), "version": b"5.1"}),
        "net.onnx": onnx_bytes(tensors),
    }  # fmt: skip
