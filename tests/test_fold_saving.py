"""Folded models in files: what comes back computes the same, and hostile files are refused."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw
from normwise.errors import InputError, MissingDependencyError, OutputError
from normwise.graph import exporting, fold, load_folded
from normwise.graph.saving import KEY

Json = dict[str, Any]


class Net(nn.Module):
    """All that a fold does: into weights, into a border, a residual's tail, a multiply-add."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        c = channels
        self.conv1 = nn.Conv2d(3, c, 3, padding=1, bias=False)
        self.bn1 = nw.nn.BatchNorm2d(c, activation="relu")
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn2 = nw.nn.BatchNorm2d(c, activation="relu")
        self.bn3 = nn.BatchNorm2d(c)
        self.conv3 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(c)
        self.head = nn.Linear(c, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x), residual=x)
        x = self.conv3(self.bn3(x))
        x = self.bn4(x.sigmoid())
        return self.head(x.square().mean((2, 3)))


def randomized(model: nn.Module) -> nn.Module:
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias)
    return model.eval()


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())


def folded(model: nn.Module | None = None, x: Tensor | None = None) -> Any:
    model = Net() if model is None else model
    return fold(randomized(model), torch.randn(2, 3, 9, 9) if x is None else x, seconds=0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.safetensors"


# One file of safetensors and back


def test_a_fresh_model_computes_what_was_saved(file: Path) -> None:
    result = folded()
    assert {e.action for e in result.report} == {"folded", "multiply-add"}
    result.save(file)
    x = torch.randn(3, 3, 11, 7)
    fresh = Net()
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    loaded = load_folded(fresh, file)
    assert torch.equal(loaded(x), result.model(x))
    assert not loaded.training
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


def test_what_was_trained_after_the_fold_is_what_is_saved(file: Path) -> None:
    result = folded()
    x = torch.randn(2, 3, 9, 9)
    (result.model(x) * torch.randn(2, 4)).sum().backward()
    with torch.no_grad():
        for p in result.model.parameters():
            p -= 0.1 * p.grad
    result.save(file)
    assert torch.equal(load_folded(Net(), file)(x), result.model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_those_that_were_saved(file: Path, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 9, 9, dtype=dtype)
    result = folded(Net().to(dtype), x)
    result.save(file)
    loaded = load_folded(Net(), file)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(x), result.model(x))


def test_tied_weights_are_saved_once_and_stay_tied(file: Path) -> None:
    def build() -> nn.Module:
        net = nn.Sequential(
            nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)
        )
        net[4].weight = net[2].weight
        return net

    result = folded(build())
    result.save(file)
    loaded = load_folded(build(), file)
    assert loaded[4].weight is loaded[2].weight
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(loaded(x), result.model(x))
    assert "4.weight" not in header(file)


def test_views_of_one_memory_are_saved_whole(file: Path) -> None:
    result = folded(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()), torch.randn(4, 3))
    memory = torch.randn(4, 3)
    result.model[0].weight.data = memory[:3]
    result.model[0].bias.data = memory[1:, 0]
    result.save(file)
    loaded = load_folded(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()), file)
    assert torch.equal(loaded[0].weight, memory[:3])
    assert torch.equal(loaded[0].bias, memory[1:, 0])


class Functional(nn.Module):
    """A batch norm as a function call, on buffers that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.randn(4), persistent=False)
        self.register_buffer("var", torch.rand(4) + 0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var).relu()


def test_buffers_outside_the_state_dict_that_the_fold_changed(file: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    result = folded(Functional(), x)
    assert result.structure["neutral"] == ["mean", "var"]
    result.save(file)
    assert torch.equal(load_folded(Functional(), file)(x), result.model(x))


def test_a_norm_left_in_training_mode_comes_back_in_it(file: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    net[3].train()
    result = fold(net, torch.randn(2, 3, 9, 9), seconds=0)
    result.save(file)
    fresh = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    assert [m.training for m in load_folded(fresh, file)] == [False, False, False, True]


def test_transposed_borders(file: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Sigmoid(), nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 6, 3, 2, groups=3)
        )

    result = folded(build())
    result.save(file)
    x = torch.randn(1, 3, 6, 5)
    assert torch.equal(load_folded(build(), file)(x), result.model(x))


def test_a_batch_norm_alone(file: Path) -> None:
    result = folded(nn.BatchNorm2d(3))
    result.save(file)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(load_folded(nn.BatchNorm2d(3), file)(x), result.model(x))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        folded().save(tmp_path / "nowhere" / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_no_tensor_is_refused(file: Path) -> None:
    class Stateful(nn.Conv2d):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError

    result = folded(nn.Sequential(Stateful(3, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(InputError, match=r"0\._extra_state, which is dict"):
        result.save(file)
    assert not file.exists()


@pytest.mark.parametrize("name", ["safetensors.torch", "onnx", "onnxscript"])
def test_missing_packages_are_named(file: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = folded()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"normwise\[export\]"):
        result.save(file) if name.startswith("safe") else result.to_onnx(file)


# Files that nobody should trust


def header(path: Path) -> Json:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    parsed: Json = json.loads(data[8 : 8 + length])
    return parsed


def rewritten(path: Path, change: Callable[[Json, Json], object]) -> None:
    """``change(header, config)`` the file's header; the tensors stay as they are."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + length])
    config = json.loads(head["__metadata__"][KEY])
    made = change(head, config)
    head["__metadata__"][KEY] = made if isinstance(made, str) else json.dumps(config)
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("content") / "net.safetensors"
    torch.manual_seed(0)
    folded().save(path)
    return path.read_bytes()


@pytest.fixture
def saved(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("part", [0, 4, 8, 200, 0.5, 0.999])
def test_truncated_files(saved: Path, part: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: part if isinstance(part, int) else int(part * len(data))])
    with pytest.raises(InputError, match=r"result\.save"):
        load_folded(Net(), saved)


def test_no_file_and_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        load_folded(Net(), tmp_path / "none")
    with pytest.raises(InputError, match="something else than a file"):
        load_folded(Net(), tmp_path)
    torch.save(Net().state_dict(), tmp_path / "pickle.pt")
    with pytest.raises(InputError, match="header"):
        load_folded(Net(), tmp_path / "pickle.pt")


def test_safetensors_of_others(tmp_path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(InputError, match=r"without 'normwise\.fold'"):
        load_folded(Net(), tmp_path / "other")


def test_a_long_header_is_refused_before_it_is_read(saved: Path) -> None:
    saved.write_bytes(struct.pack("<Q", 10**8) + b"[" * 10**6)
    with pytest.raises(InputError, match="a header of 100000000 bytes"):
        load_folded(Net(), saved)


def set_structure(key: str, value: Any) -> Callable[[Json, Json], object]:
    return lambda head, config: config["structure"].update({key: value})


def set_norm(**values: Any) -> Callable[[Json, Json], object]:
    return lambda head, config: config["structure"]["norms"][-1].update(values)


HOSTILE: dict[str, tuple[Callable[[Json, Json], object], str]] = {
    "no json": (lambda head, config: "{", "no JSON"),
    "deep json": (lambda head, config: "[" * 9999, "no JSON"),
    "list": (lambda head, config: "[]", "no JSON object"),
    "version": (lambda head, config: config.update(version=2), "format version 2"),
    "no dtypes": (lambda head, config: config.pop("dtypes"), "'dtypes' is no dict"),
    "structure": (lambda head, config: config["structure"].pop("biases"), "a structure"),
    "unknown bias": (set_structure("biases", ["conv9"]), "module 'conv9'"),
    "bias of a list": (set_structure("biases", [[]]), r"module \[\]"),
    "bias taken": (set_structure("biases", ["head"]), "has one"),
    "bias of a norm": (set_structure("biases", ["bn1"]), "has one"),
    "border of a linear": (set_structure("borders", {"head": [1]}), "which is Linear"),
    "border of another": (set_structure("borders", {"conv1": [8, 1, 3, 3]}), "another model"),
    "norm of a string": (set_structure("norms", ["bn1"]), "no JSON object"),
    "kind": (set_norm(kind="__import__"), "kind '__import__'"),
    "kind of a list": (set_norm(kind=[]), r"kind \[\]"),
    "path": (set_norm(path="head"), "has a Linear"),
    "dunder": (set_norm(path="__class__"), "module '__class__'"),
    "activation": (set_norm(activation="os.system"), "activation 'os.system'"),
    "activation of a list": (set_norm(activation=["relu"]), "activation"),
    "axis": (set_norm(channel_dim=10**9), "axis 1000000000"),
    "axis of a bool": (set_norm(channel_dim=True), "axis True"),
    "features": (set_norm(features=10**12), "1000000000000 channels"),
    "twice": (set_norm(path="bn1", kind="identity"), "two changes"),
    "dtype": (lambda h, c: c["dtypes"].update({"head.weight": "Tensor"}), "dtype 'Tensor'"),
    "integers": (lambda h, c: c["dtypes"].update({"head.weight": "int64"}), "dtype 'int64'"),
    "alias": (lambda h, c: c["aliases"].update({"head.bias": "conv1.bias"}), "another name"),
    "alias of a list": (lambda h, c: c["aliases"].update({"head.bias": []}), "another name"),
    "training": (lambda h, c: c.update(training=[3]), "module 3"),
    "shape": (lambda h, c: h["head.weight"].update(shape=[8, 4]), r"shape \[8, 4\]"),
    "huge shape": (lambda h, c: h["head.weight"].update(shape=[2**40, 2**40]), "Error"),
    "other dtype": (lambda h, c: h["head.weight"].update(dtype="I32"), "head.weight as I32"),
    "offsets": (lambda h, c: h["head.weight"].update(data_offsets=[0, 2**60]), "Error"),
    "renamed": (lambda h, c: h.update(other=h.pop("head.bias")), "head.bias, other"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(saved: Path, case: str) -> None:
    change, says = HOSTILE[case]
    rewritten(saved, change)
    with pytest.raises(InputError, match=says):
        load_folded(Net(), saved)


def test_a_file_of_another_size_of_model(saved: Path) -> None:
    with pytest.raises(InputError, match="channels of 'bn4', which has 6"):
        load_folded(Net(6), saved)


def test_a_file_of_another_class(saved: Path) -> None:
    with pytest.raises(InputError, match="module 'conv1'"):
        load_folded(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), saved)


def test_flipped_bytes_are_refused_or_are_other_weights(saved: Path, content: bytes) -> None:
    generator = torch.Generator().manual_seed(0)
    net, refused = Net(), 0
    (length,) = struct.unpack("<Q", content[:8])
    for at in torch.randint(8 + length, (60,), generator=generator).tolist():
        broken = bytearray(content)
        broken[at] ^= 1 << (at % 8)
        saved.write_bytes(broken)
        try:
            load_folded(net, saved)
        except InputError:
            refused += 1
    assert refused >= 30


def test_meta_models_are_refused(saved: Path) -> None:
    with torch.device("meta"):
        net = Net()
    with pytest.raises(InputError, match="meta device"):
        load_folded(net, saved)


# torch.export programs and ONNX


def test_the_exported_program_takes_any_batch(tmp_path: Path) -> None:
    result = folded(x=torch.randn(1, 3, 9, 9))
    path = tmp_path / "net.pt2"
    result.save_program(path)
    run = torch.export.load(path).module()
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 9, 9)
        torch.testing.assert_close(run(x), result.model(x), rtol=1e-5, atol=1e-5)


class Pair(nn.Module):
    """Keyword arguments, two outputs, and a batch that the code fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        y = self.bn(self.conv(x))
        return {"y": y * scale, "flat": y.reshape(2, -1)}


def test_a_fixed_batch_and_keywords() -> None:
    inputs = {"x": torch.randn(2, 2, 8), "scale": torch.randn(2, 1, 1)}
    result = fold(randomized(Pair()), inputs, seconds=0)
    got, wanted = result.export().module()(**inputs), result.model(**inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if x.sum() > 0 else x


def test_exports_leave_the_model_alone_and_are_of_eval_mode() -> None:
    net = nn.Sequential(small(), nn.Dropout(), nn.BatchNorm2d(4), nn.Tanh())
    result = folded(net)
    x = torch.randn(2, 3, 9, 9)
    wanted = result.model(x)
    result.model.train()
    before = {k: v.clone() for k, v in result.model.state_dict().items()}
    torch.testing.assert_close(result.export().module()(x), wanted, rtol=1e-5, atol=1e-5)
    assert result.model.training
    assert all(torch.equal(v, before[k]) for k, v in result.model.state_dict().items())


def test_what_cannot_be_exported_is_an_error() -> None:
    result = folded(Branches(), torch.ones(2, 3, 4, 4))
    with pytest.raises(InputError, match=r"torch\.export must be able to trace"):
        result.export()


class Counting(nn.Module):
    """What a trace does not see: a number that changes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.bn(self.conv(x)) * self.calls


def test_a_program_that_computes_something_else_is_an_error() -> None:
    result = folded(Counting(), torch.ones(2, 3, 4, 4))
    with pytest.raises(InputError, match="off by"):
        result.export()


def test_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    result = folded()
    path = tmp_path / "net.onnx"
    made = result.to_onnx(path)
    assert made.dynamic_batch
    assert made.batch_norms == 0
    assert made.error is not None
    assert made.error < 1e-5
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(6, 3, 9, 9)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), result.model(x), rtol=1e-4, atol=1e-4)


def test_onnx_of_a_model_whose_batch_norm_stays(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(3), nn.Tanh())
    net[1].register_forward_hook(lambda module, args, output: None)
    result = folded(net)
    assert [e.reason for e in result.report] == ["hook"]
    assert result.to_onnx(tmp_path / "net.onnx").batch_norms == 1


def test_a_norm_of_normwise_that_stays_is_exported_as_arithmetic(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nw.nn.BatchNorm2d(4, activation="silu"))
    net[1].register_forward_hook(lambda module, args, output: None)
    result = folded(net)
    assert [e.reason for e in result.report] == ["hook"]
    assert "normwise" not in str(result.export().graph)
    assert result.to_onnx(tmp_path / "net.onnx").error is not None


def test_onnx_that_the_runtime_does_not_take(tmp_path: Path) -> None:
    result = folded(small().bfloat16(), torch.randn(2, 3, 4, 4, dtype=torch.bfloat16))
    with pytest.raises(InputError, match="onnxruntime must be able to run"):
        result.to_onnx(tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_a_runtime_says_that_nothing_was_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert folded(small()).to_onnx(tmp_path / "net.onnx").error is None


def test_onnx_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = folded(small())
    call = exporting._Session.__call__
    monkeypatch.setattr(
        exporting._Session, "__call__", lambda *a, **k: [1.001 * t for t in call(*a, **k)]
    )
    with pytest.raises(InputError, match="under onnxruntime must compute"):
        result.to_onnx(tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
