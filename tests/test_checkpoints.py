"""Checkpoints: what a model saved is what is read, format by format; what is refused, and how.

The expected tensors are those of the model's own state dict. Hostile files in bulk are fuzzed in
test_checkpoints_fuzz.py.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files as make
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import normwise as nw
from normwise.errors import CheckpointError, NormwiseError
from normwise.interop.checkpoints import StoredNorm, group_norms, open_checkpoint

FORMATS = {"safetensors": "safetensors", "pt": "pickle", "pth": "pickle", "pt2": "exported",
           "onnx": "onnx"}  # fmt: skip


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return make.files()


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write(name: str, data: bytes) -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


Put = Callable[[str, bytes], Path]


def norms_of(path: Path) -> dict[str, StoredNorm]:
    with open_checkpoint(path) as checkpoint:
        return {norm.name: norm for norm in checkpoint.norms()}


def same(given: Tensor | None, wanted: Tensor) -> bool:
    return given is not None and given.dtype == wanted.dtype and torch.equal(given, wanted)


def holds(norm: StoredNorm, state: make.State, prefix: str, *without: str) -> bool:
    roles = [role for role in make.ROLES if role not in without]
    return all(same(getattr(norm, role), state[f"{prefix}.{role}"]) for role in roles)


def refusal(path: Any) -> str:
    """The message; that it has the three parts is checked."""
    with pytest.raises(CheckpointError, match=r"; got (?s:.)+\. Try: .+\.$") as caught:
        norms_of(path)
    text = str(caught.value)
    assert "trips" not in text, text
    return text


# What is read is what was saved

NAMES = ("net.safetensors", "net.pt", "nested.pth", "legacy.pt", "script.pt", "net.pt2", "old.pt2",
         "net.onnx")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_norms_are_those_that_were_saved(name: str, files: dict[str, bytes], put: Put) -> None:
    state = make.state()
    norms = norms_of(put(name, files[name]))
    assert list(norms) == ["1", "4"]
    without = ("num_batches_tracked",) if name.endswith("onnx") else ()
    assert all(holds(norms[prefix], state, prefix, *without) for prefix in norms)
    assert {norm.kind for norm in norms.values()} == {"batch_norm"}


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_can_be_read(name: str, files: dict[str, bytes], put: Put) -> None:
    state = {n: t for n, t in make.state().items() if name != "net.onnx" or "tracked" not in n}
    with open_checkpoint(put(name, files[name])) as checkpoint:
        assert checkpoint.format == FORMATS[name.rpartition(".")[2]]
        assert checkpoint.tensors.keys() == state.keys()
        for n, t in state.items():
            info = checkpoint.tensors[n]
            assert (info.shape, info.dtype) == (tuple(t.shape), t.dtype)
            assert same(checkpoint.read(n), t)


def test_only_the_norms_are_read(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"conv.weight": torch.ones(1024, 1024), **make.state()}
    graph = make.model_of([make.norm_node("1", "x", "y")], make.initializers(state))
    paths = [
        put("big.safetensors", make.safe(state)),
        put("big.pt", make.saved(state)),
        put("big.onnx", graph.SerializeToString()),
    ]
    read = 0
    preadv = os.preadv

    def counted(number: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        read += sum(map(len, buffers))
        return preadv(number, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    for path in paths:
        assert norms_of(path)["1"].running_mean is not None
    assert 0 < read < 400_000  # of 12.6 MB; a window of 64 KB is the largest piece


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
     torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16,
     torch.uint32, torch.uint64, torch.bool],
    ids=str,
)  # fmt: skip
def test_dtypes(dtype: torch.dtype, put: Put) -> None:
    t = torch.tensor([[0.0, 1.0], [3.0, 5.0]]).to(dtype)
    state = {"t": t, "none": t[:0], "one": t[1, 1]}
    state = {name: t.clone() for name, t in state.items()}
    for path in (
        put("t.safetensors", make.safe(state)),
        put("t.pt", make.saved(state)),
        put("old.pt", make.legacy(state)),
    ):
        with open_checkpoint(path) as checkpoint:
            for name, t in state.items():
                got = checkpoint.read(name)
                assert (got.dtype, got.shape) == (dtype, t.shape)
                assert torch.equal(got[None].view(torch.uint8), t[None].view(torch.uint8))


def test_views_of_one_storage(put: Put) -> None:
    base = torch.arange(24.0)
    state = {"a": base[3:9], "b": base.view(4, 6).t(), "c": base[::5], "d": base[:1].expand(7)}
    for path in (put("v.pt", make.saved(state)), put("old.pt", make.legacy(state))):
        with open_checkpoint(path) as checkpoint:
            assert all(torch.equal(checkpoint.read(name), t) for name, t in state.items())


def test_the_other_byte_order(put: Put) -> None:
    state = {
        "m": torch.tensor([1.5, -2.0, 1e30]),
        "n": torch.tensor([7]),
        "b": torch.tensor([3]).byte(),
    }
    entries = make.unzipped(make.saved(state))
    swapped = {}
    for name, data in entries.items():
        key = name.partition("/data/")[2]
        kind = {"0": np.dtype("f4"), "1": np.dtype("i8")}.get(key)
        swapped[name] = np.frombuffer(data, kind).byteswap().tobytes() if kind else data
        if name.endswith("/byteorder"):
            swapped[name] = b"big"
    with open_checkpoint(put("big_endian.pt", make.zipped(swapped))) as checkpoint:
        assert all(torch.equal(checkpoint.read(name), t) for name, t in state.items())


def test_parameters_and_attributes(put: Put) -> None:
    p = nn.Parameter(torch.rand(3))
    p.note = "kept beside"  # type: ignore[attr-defined] # of a user
    state = {"a": nn.Parameter(torch.rand(3)), "b": p, "c": nn.Buffer(torch.rand(2))}
    with open_checkpoint(put("p.pt", make.saved(state))) as checkpoint:
        assert all(torch.equal(checkpoint.read(name), t) for name, t in state.items())


def test_tensors_do_not_share_memory(put: Put) -> None:
    with open_checkpoint(put("net.pt", make.saved(make.state()))) as checkpoint:
        checkpoint.read("1.weight").zero_()
        assert same(checkpoint.read("1.weight"), make.state()["1.weight"])


# Where the model is in what was saved

EXTRAS: dict[str, Any] = {
    "epoch": 3, "loss": [0.5, 0.25], "best": None, "device": torch.device("cpu"),
    "size": torch.Size([1, 2]), "rate": np.float64(0.1), "seen": {1, 2},
}  # fmt: skip


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, **EXTRAS},
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, **EXTRAS},
        lambda s: {"model_state_dict": OrderedDict(s), **EXTRAS},
        lambda s: {"model": {"state_dict": s}, **EXTRAS},
        lambda s: {"model": None, "ema": s},
        lambda s: {"ema": {k: v + 1 for k, v in s.items()}, "state_dict": s},
        lambda s: {"state_dict": {"module." + k: v for k, v in s.items()}},
        lambda s: {"_orig_mod.module." + k: v for k, v in s.items()},
        lambda s: {"n_averaged": torch.tensor(4), **{"module." + k: v for k, v in s.items()}},
        lambda s: s,
    ],
)
def test_state_dicts_are_found(wrap: Callable[[make.State], Any], put: Put) -> None:
    state = make.state()
    norms = norms_of(put("w.pt", make.saved(wrap(state))))
    assert list(norms) == ["1", "4"]
    assert all(holds(norm, state, name) for name, norm in norms.items())


def test_two_networks_keep_their_names(put: Put) -> None:
    both = {
        "generator": make.state(1),
        "critic": make.state(2),
        "optimizer_g": {"x": torch.ones(1)},
    }
    norms = norms_of(put("gan.pt", make.saved(both)))
    assert list(norms) == ["generator.1", "generator.4", "critic.1", "critic.4"]
    assert same(norms["critic.4"].running_var, make.state(2)["4.running_var"])


def test_prefixes_in_safetensors(put: Put) -> None:
    state = make.state()
    path = put("m.safetensors", make.safe({"module." + k: v for k, v in state.items()}))
    assert holds(norms_of(path)["4"], state, "4")


def test_one_layer_called_module_keeps_its_name(put: Put) -> None:
    state = {"module.bn.running_mean": torch.ones(2), "module.bn.running_var": torch.ones(2),
             "head.weight": torch.ones(2, 2)}  # fmt: skip
    assert list(norms_of(put("m.pt", make.saved(state)))) == ["module.bn"]


# Which tensors make a norm


def test_norms_without_running_statistics_by_name(put: Put) -> None:
    two = torch.ones(2)
    layers = {"ln_1": "wb", "blocks.0.layernorm": "wb", "gn2": "wb", "a.group_norm": "wb",
              "b.rms_norm": "w", "instance_norm": "wb",
              "norm": "wb", "act": "w", "input_layernorm": "w", "line": "wb"}  # fmt: skip
    state = {}
    for name, roles in layers.items():
        state[name + ".weight"] = two
        if "b" in roles:
            state[name + ".bias"] = two
    kinds = {name: norm.kind for name, norm in norms_of(put("k.pt", make.saved(state))).items()}
    assert kinds == {"ln_1": "layer_norm", "blocks.0.layernorm": "layer_norm", "gn2": "group_norm",
                     "a.group_norm": "group_norm", "b.rms_norm": "rms_norm",
                     "instance_norm": "instance_norm"}  # fmt: skip


def test_norms_without_parameters_or_counter(put: Put) -> None:
    norm = nn.BatchNorm2d(3, affine=False)
    state = {k: v for k, v in norm.state_dict(prefix="bn.").items() if "tracked" not in k}
    got = norms_of(put("a.pt", make.saved(state)))["bn"]
    assert got.weight is got.bias is got.num_batches_tracked is None
    assert same(got.running_var, torch.ones(3))


def test_domains_have_the_layers_scale(put: Put) -> None:
    bn = nw.nn.BatchNorm2d(3, domains=["night"])
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    norms = norms_of(put("d.pt", make.saved({"bn." + k: v for k, v in bn.state_dict().items()})))
    assert list(norms) == ["bn", "bn.domains.night"]
    assert same(norms["bn.domains.night"].weight, torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"1.running_var": torch.ones(6)}, "running_var (6,)"),
        ({"1.weight": torch.ones(5, 1)}, "weight (5, 1)"),
        ({"1.running_mean": torch.ones(5, dtype=torch.int64)}, "dtype torch.int64"),
        ({"1.num_batches_tracked": torch.ones(2)}, "num_batches_tracked (2,)"),
    ],
)
def test_tensors_of_a_norm_that_do_not_fit(change: make.State, got: str, put: Put) -> None:
    text = refusal(put("m.pt", make.saved({**make.state(), **change})))
    assert "'1'" in text
    assert got in text


def shapes(state: make.State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in state.items()}


def test_state_dicts_in_memory_by_the_same_rules() -> None:
    state = {**make.state(), "ln_1.weight": torch.ones(2), "ln_1.bias": torch.ones(2)}
    norms = {norm.name: norm for norm in group_norms(shapes(state), state.__getitem__)}
    assert {name: norm.kind for name, norm in norms.items()} == {
        "1": "batch_norm", "4": "batch_norm", "ln_1": "layer_norm"}  # fmt: skip
    assert holds(norms["4"], state, "4")
    state["4.running_var"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"'4' in 'state_dict' with .*running_var \(3,\)"):
        group_norms(shapes(state), state.__getitem__)


def test_counters_cast_with_the_weights(put: Put) -> None:
    state = make.state()
    state["1.num_batches_tracked"] = torch.tensor(1000.0).half()
    state["4.num_batches_tracked"] = torch.tensor(100_000.0).half()
    norms = norms_of(put("half.pt", make.saved(state)))
    assert same(norms["1"].num_batches_tracked, torch.tensor(1000))
    assert norms["4"].num_batches_tracked is None


# Pickles that want more than tensors


class Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("whole", [True, False])
def test_code_is_not_run(protocol: int, whole: bool, put: Put, tmp_path: Path) -> None:
    trap = Calls(os.mkdir, str(tmp_path / "was_run"))
    data = pickle.dumps(trap if whole else {"a": torch.Size([1]), "b": trap}, protocol)
    for path in (put("evil.pt", make.with_pickle(data)), put("plain.pkl", data)):
        text = refusal(path)
        assert "calls 'posix.mkdir'" in text
        assert str(path) in text
    assert not (tmp_path / "was_run").exists()


def test_a_call_in_the_legacy_format(put: Put, tmp_path: Path) -> None:
    data = make.legacy(
        {"state_dict": make.state(), "x": Calls(os.mkdir, str(tmp_path / "was_run"))}
    )
    assert "calls 'posix.mkdir'" in refusal(put("evil.pt", data))
    assert not (tmp_path / "was_run").exists()


def test_whole_models_are_refused_with_the_way_out(put: Put) -> None:
    for data in (make.saved(make.network()), make.legacy(make.network())):
        text = refusal(put("model.pt", data))
        assert "torch.nn.modules.container.Sequential" in text
        assert "torch.save(model.state_dict(), path)" in text


def test_objects_beside_the_weights_are_refused_by_name(put: Put) -> None:
    data = make.saved({"state_dict": make.state(), "config": nn.ReLU()})
    assert "torch.nn.modules.activation.ReLU" in refusal(put("c.pt", data))


def test_pickled_names_cannot_write_to_the_terminal(put: Put) -> None:
    text = refusal(put("esc.pt", make.with_pickle(b"c\x1b[2Jos\nsystem\n)R.")))
    assert "\x1b" not in text


def test_a_pickle_of_no_tensors(put: Put) -> None:
    assert "without tensors" in refusal(put("n.pt", make.saved({"epoch": 3})))


# What is no checkpoint


@pytest.mark.parametrize(
    ("start", "got"),
    [
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!doctype html><html>", "web page"),
        (b"PK\x05\x06" + bytes(18), "empty zip"),
        (b"%PDF-1.7", "starts with b'%PDF"),
        (bytes(257) + b"ustar\0" + b"00", "a tar archive"),
    ],
)
def test_other_files_are_named(start: bytes, got: str, put: Put) -> None:
    assert got in refusal(put("model.weights", start + bytes(64)))


def test_a_zip_with_a_checkpoint_inside(put: Put) -> None:
    text = refusal(put("net.zip", make.zipped({"net.safetensors": make.safe(make.state())})))
    assert "net.safetensors" in text
    assert "unpacking" in text


def test_a_compressed_archive_is_refused(put: Put) -> None:
    data = make.zipped(make.unzipped(make.saved(make.state())), 8)
    assert "compressed" in refusal(put("net.pt", data))


def test_things_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    (tmp_path / "nowhere.pt").symlink_to(tmp_path / "missing")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder").mkdir()
    place = os.getcwd()
    os.chdir(tmp_path)  # the path of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as held:
            held.bind("socket.pt")
            assert "a socket" in refusal("socket.pt")
    finally:
        os.chdir(place)
    for name, got in {"pipe.pt": "a pipe", "loop.pt": "OSError", "nowhere.pt": "a link to nothing",
                      "empty.pt": "an empty file", "folder": "no checkpoint", "missing": "no file",
                      "nul\0": "ValueError", "x" * 300: "OSError"}.items():  # fmt: skip
        assert got in refusal(tmp_path / name), name
    assert "a device" in refusal("/dev/zero")


def test_a_closed_checkpoint_and_an_unknown_name(put: Put) -> None:
    checkpoint = open_checkpoint(put("net.pt", make.saved(make.state())))
    with checkpoint, pytest.raises(CheckpointError, match=r"'9\.weight'"):
        checkpoint.read("9.weight")
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read("1.weight")


def test_a_file_that_shrinks_while_it_is_open(put: Put) -> None:
    path = put("net.safetensors", make.safe(make.state()))
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, 100)
        with pytest.raises(CheckpointError, match="shorter"):
            checkpoint.norms()


def test_the_error_is_one_of_normwise() -> None:
    assert issubclass(CheckpointError, NormwiseError)


# Safetensors

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (make.safe_of({"a": {**F32, "shape": [3]}}, bytes(8)), "in 8 bytes"),
        (make.safe_of({"a": {**F32, "shape": [4], "data_offsets": [0, 16]}}, bytes(8)), "past the"),
        (make.safe_of({"a": F32, "b": F32}, bytes(8)), "overlap"),
        (make.safe_of({"a": {**F32, "data_offsets": [8, 16]}}, bytes(16)), "gap"),
        (make.safe_of({"a": F32}, bytes(9)), "9 bytes"),
        (make.safe_of({"a": {**F32, "shape": [-2]}}, bytes(8)), "not dtype, shape and offsets"),
        (make.safe_of({"a": {**F32, "shape": [True, 2]}}, bytes(8)), "not dtype"),
        (make.safe_of({"a": {**F32, "shape": [2.0]}}, bytes(8)), "not dtype"),
        (make.safe_of({"a": [1]}, bytes(8)), "list"),
        (make.safe_of([1]), "a list, not an object"),
        (make.safe_of(b'{"a":1,"a":2}'), "twice"),
        (make.safe_of(b"{" * 200_000), "cannot be read"),
        (make.safe_of(b'{"a":' * 100_000), "nested without end"),
        (struct.pack("<Q", 2**31) + b"{}", "header of 2147483648 bytes"),
        (struct.pack("<Q", 2**20) + b"{}", "past the end"),
        (b"{}", "past the end"),
    ],
    ids=range(16),
)  # fmt: skip
def test_headers_that_lie(data: bytes, got: str, put: Put) -> None:
    assert got in refusal(put("net.safetensors", data))


def test_a_header_whose_length_reads_like_gzip(put: Put) -> None:
    state = make.state()
    data = make.safe(state)
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].ljust(0x8B1F)
    path = put("net.safetensors", make.safe_of(header, data[8 + length :]))
    assert path.read_bytes().startswith(b"\x1f\x8b")
    assert holds(norms_of(path)["4"], state, "4")


def test_a_dtype_of_the_future_does_not_hide_the_norms(put: Put) -> None:
    state = make.state()
    data = make.safe(state)
    length = int.from_bytes(data[:8], "little")
    header = eval(data[8 : 8 + length].decode())  # this test's own
    header["x"] = {"dtype": "F3", "shape": [8], "data_offsets": [len(data) - length - 8] * 2}
    path = put("f.safetensors", make.safe_of(header, data[8 + length :]))
    assert holds(norms_of(path)["1"], state, "1")
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="later torch"):
        checkpoint.read("x")


# ONNX


def test_onnx_settings_are_torchs(files: dict[str, bytes], put: Put) -> None:
    norms = norms_of(put("net.onnx", files["net.onnx"]))
    assert (norms["1"].eps, norms["1"].momentum) == (1e-3, 0.2)
    assert (norms["4"].eps, norms["4"].momentum) == (1e-5, 0.1)  # the standard's, given by no one


def test_onnx_data_beside_the_file(tmp_path: Path) -> None:
    state = make.state()
    onnx.save(make.onnx_model(state), tmp_path / "net.onnx", save_as_external_data=True,
              location="weights.bin", size_threshold=0)  # fmt: skip
    assert (tmp_path / "weights.bin").stat().st_size > 0
    assert holds(norms_of(tmp_path / "net.onnx")["4"], state, "4", "num_batches_tracked")
    (tmp_path / "weights.bin").write_bytes(b"1234")
    assert "past the end" in refusal(tmp_path / "net.onnx")
    (tmp_path / "weights.bin").unlink()
    assert "no file" in refusal(tmp_path / "net.onnx")


@pytest.mark.parametrize(
    "place", ["../secret", "/etc/hostname", "a/../../secret", "", "C:\\x", "out"]
)
def test_onnx_data_elsewhere_is_refused(place: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret").write_bytes(bytes(4096))
    (inner / "out").symlink_to(tmp_path / "secret")
    model = make.onnx_model(make.state())
    onnx.save(model, inner / "net.onnx", save_as_external_data=True, location="w", size_threshold=0)
    model = onnx.load(inner / "net.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = place
    (inner / "net.onnx").write_bytes(model.SerializeToString())
    text = refusal(inner / "net.onnx")
    assert "beside it" in text or "leads out" in text


def test_onnx_constants_names_for_names_and_typed_data(put: Put) -> None:
    half = helper.make_tensor("bn.weight", TensorProto.FLOAT16, [2], [0.5, 2.0])
    listed = helper.make_tensor("mean", TensorProto.FLOAT, [2], [3.0, -4.0])
    double = helper.make_tensor("shift", TensorProto.DOUBLE, [2], [1.0, 1e-300])
    assert half.int32_data or half.raw_data
    half.ClearField("raw_data")
    half.int32_data[:] = [int(n) for n in np.array([0.5, 2.0], np.float16).view(np.uint16)]
    variance = numpy_helper.from_array(np.array([5.0, 6.0], np.float32))
    nodes = [
        helper.make_node("Constant", [], ["v"], value=variance),
        helper.make_node("Identity", ["mean"], ["same"]),
        helper.make_node("Identity", ["same"], ["m"]),
        helper.make_node(
            "BatchNormalization", ["x", "bn.weight", "shift", "m", "v"], ["h"], name="n1"
        ),
        helper.make_node(
            "BatchNormalization", ["h", "bn.weight", "shift", "m", "v"], ["y"], name="n2"
        ),
    ]
    (norm,) = norms_of(
        put("c.onnx", make.model_of(nodes, [half, listed, double]).SerializeToString())
    ).values()
    assert norm.name == "bn"
    assert same(norm.weight, torch.tensor([0.5, 2.0]).half())
    assert same(norm.bias, torch.tensor([1.0, 1e-300], dtype=torch.float64))
    assert same(norm.running_mean, torch.tensor([3.0, -4.0]))
    assert same(norm.running_var, torch.tensor([5.0, 6.0]))


def test_onnx_other_norms(put: Put) -> None:
    one = numpy_helper.from_array(np.ones(4, np.float32), "one")
    nodes = [
        helper.make_node("LayerNormalization", ["x", "one", "one"], ["a"], name="l", epsilon=1e-6),
        helper.make_node("InstanceNormalization", ["a", "one", "one"], ["b"], name="i"),
        helper.make_node("GroupNormalization", ["b", "one", "one"], ["c"], name="g", num_groups=2),
        helper.make_node("RMSNormalization", ["c", "one"], ["y"], name="r"),
        helper.make_node(
            "BatchNormalization", ["c", "one", "one", "a", "b"], ["z"], name="computed"
        ),
    ]
    norms = norms_of(put("o.onnx", make.model_of(nodes, [one]).SerializeToString()))
    assert {n: (v.kind, v.eps, v.momentum) for n, v in norms.items()} == {
        "l": ("layer_norm", 1e-6, None), "i": ("instance_norm", 1e-5, None),
        "g": ("group_norm", 1e-5, None), "r": ("rms_norm", 1e-5, None)}  # fmt: skip


def test_a_file_that_is_no_onnx(put: Put) -> None:
    assert "without its graph" in refusal(put("x.onnx", b"\x08\x07\x12\x02ab"))
    assert "longer than itself" in refusal(put("x.onnx", b"\x3a\xff\x7fabc"))
    assert "unknown kind" in refusal(put("x.onnx", b"hello, this is a text"))
    assert "does not end" in refusal(put("x.onnx", b"\xff" * 40))


# Exported programs


def test_what_torch_exports(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2))
    model(torch.randn(2, 3, 8, 8))
    program = torch.export.export(model.eval(), (torch.randn(2, 3, 8, 8),))
    torch.export.save(program, tmp_path / "net.pt2")
    norm = norms_of(tmp_path / "net.pt2")["1"]
    assert holds(norm, model.state_dict(), "1")
    assert (norm.eps, norm.momentum) == (1e-3, 0.2)


def test_exported_settings(files: dict[str, bytes], put: Put) -> None:
    norms = norms_of(put("net.pt2", files["net.pt2"]))
    assert {(norm.eps, norm.momentum) for norm in norms.values()} == {(1e-3, 0.2)}


def test_exported_versions_of_the_future(put: Put) -> None:
    text = refusal(put("net.pt2", make.exported(make.state(), version="7")))
    assert "version '7'" in text


def test_exported_without_weights(put: Put) -> None:
    data = make.zipped({"a/archive_format": b"pt2", "a/archive_version": b"0", "a/x.so": b"ELF"})
    assert "compiled" in refusal(put("net.pt2", data))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"path_name": "weight_99"}, "without 'data/weights/weight_99'"),
        ({"path_name": "../../etc/passwd"}, "without"),
        ({"path_name": 3}, "without"),
        ({"tensor_meta": {"dtype": 7, "sizes": [{"as_int": 10**9}], "strides": [{"as_int": 1}],
                          "storage_offset": {"as_int": 0}}}, "element"),
        ({"tensor_meta": {"dtype": 7, "sizes": [{"as_name": "s0"}], "strides": [{"as_int": 1}],
                          "storage_offset": {"as_int": 0}}}, "no sizes"),
    ],
)  # fmt: skip
def test_exported_lies(change: dict[str, Any], got: str, put: Put) -> None:
    assert got in refusal(put("net.pt2", make.exported(make.state(), changes=change)))


# Folders


def halves() -> tuple[make.State, make.State]:
    items = list(make.state().items())
    return dict(items[:5]), dict(items[5:])


@pytest.mark.parametrize(
    ("stem", "suffix", "write"),
    [("model", "safetensors", make.safe), ("pytorch_model", "bin", make.saved)],
)
def test_shards(stem: str, suffix: str, write: Callable[[make.State], bytes], put: Put) -> None:
    parts = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    places = {}
    for part, tensors in zip(parts, halves(), strict=True):
        put(part, write(tensors))
        places.update(dict.fromkeys(tensors, part))
    path = put(f"{stem}.{suffix}.index.json", make.index(places))
    for given in (path.parent, path):
        with open_checkpoint(given) as checkpoint:
            assert checkpoint.format == "sharded"
            assert list(checkpoint.tensors) == list(make.state())
            norms = {norm.name: norm for norm in checkpoint.norms()}
            assert same(checkpoint.read("0.weight"), make.state()["0.weight"])
        assert list(norms) == ["1", "4"]
        assert all(holds(norm, make.state(), name) for name, norm in norms.items())


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (make.index({"a": "missing.safetensors"}), "no file"),
        (make.index({"a": "part.safetensors"}), "does not"),
        (make.index({"a": "../part.safetensors"}), "no file's name"),
        (make.index({"a": "/etc/passwd"}), "no file's name"),
        (make.index({"a": ".."}), "beside it"),
        (make.index({"a": "model.safetensors.index.json"}), "starts with"),
        (make.index({"a": 3}), "no file's name"),
        (make.index({}), "without a weight_map"),
        (b"[]", "not an object"),
        (b"{", "cannot be read"),
        (b'{"weight_map": {"a": "out.safetensors"}}', "leads out"),
    ],
)
def test_indices_that_lie(content: bytes, got: str, put: Put, tmp_path: Path) -> None:
    outside = put("outside.safetensors", make.safe(make.state()))
    put("in/part.safetensors", make.safe(make.state()))
    (tmp_path / "in" / "out.safetensors").symlink_to(outside)
    put("in/model.safetensors.index.json", content)
    assert got in refusal(tmp_path / "in")


def test_the_cache_of_hugging_face(put: Put, tmp_path: Path) -> None:
    """Snapshots are links into one folder of blobs."""
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blob = put("blobs/1a2b", make.safe(make.state()))
    places = make.index(dict.fromkeys(make.state(), "model-1.safetensors"))
    listed = put("blobs/3c4d", places)
    (snapshot / "model-1.safetensors").symlink_to(blob)
    (snapshot / "model.safetensors.index.json").symlink_to(listed)
    assert holds(norms_of(snapshot)["1"], make.state(), "1")


def test_folders_with_one_model_and_with_several(put: Put, tmp_path: Path) -> None:
    put("config.json", b"{}")
    put("net.pth", make.saved(make.state()))
    assert list(norms_of(tmp_path)) == ["1", "4"]
    put("other.pth", make.saved(make.state()))
    assert "'net.pth', 'other.pth'" in refusal(tmp_path)
    put("pytorch_model.bin", make.saved(make.state(1)))
    assert same(norms_of(tmp_path)["1"].weight, make.state(1)["1.weight"])
