"""``repair``: what is fixed is gone, what is left says why, and nothing else changes."""

from __future__ import annotations

import inspect
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import doctor
import pytest
import torch
from doctor import Case, net, norm
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import normwise as nw
from normwise.doctor import Finding, Repair, all_rules
from normwise.errors import CheckpointError, InputError, NonFiniteError, OutputError

MODULES = doctor.modules()
# Of the rules that propose an edit.
FIRES = [
    (rule.code, name)
    for rule in all_rules()
    if "Repair(" in inspect.getsource(inspect.getmodule(type(rule)))
    for name in MODULES[rule.code].FIRES
]


pytestmark = pytest.mark.usefixtures("alone")


@torch.no_grad()
def made(case: Callable[[], Case]) -> Case:
    return case()


def batches(model: nn.Module) -> list[Tensor]:
    """Two batches for a chain of norms."""
    first = next(m for m in model.modules() if hasattr(m, "num_features"))
    shape = (16, first.num_features, *([] if isinstance(first, nn.BatchNorm1d) else [4, 4]))
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) * 2 + 1 for _ in range(2)]


def negative() -> nn.Sequential:
    """Statistics that are NaN in eval mode, and a momentum from elsewhere."""
    bn = norm(running_var=-1.0, momentum=0.99)
    return net(bn1=bn, bn2=norm())


def loud() -> Any:
    bn = norm(weight=1.0, running_var=1.0)
    bn.weight.data[2] = 150.0
    return bn


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())


# What is fixed is gone


@pytest.mark.parametrize(("code", "name"), FIRES)
def test_a_fixed_finding_is_gone(code: str, name: str) -> None:
    case = made(MODULES[code].FIRES[name])
    found = [f for f in nw.check(case.subject, **case.kwargs).findings if f.code == code]
    data = None
    if any(f.repair and f.repair.recalibrate for f in found) and isinstance(
        case.subject, nn.Module
    ):
        data = case.kwargs.get("data", batches(case.subject))
    repaired, report = nw.repair(case.subject, found, unsafe=True, data=data)
    again = {(f.layer, f.message) for f in nw.check(repaired, **case.kwargs).findings}
    for finding, entry in zip(found, report, strict=True):
        if entry.action == "fixed":
            assert (finding.layer, finding.message) not in again
        else:
            assert finding.repair is None or not isinstance(case.subject, nn.Module)


def test_statistics_are_those_of_the_data() -> None:
    model = negative()
    data = batches(model)
    repaired, report = nw.repair(model, data=data)
    assert [e.name for e in report.fixed] == ["bn1"]
    expected = nw.recalibrate(model, data, layers=["bn1"], progress=False).model
    assert torch.equal(repaired.bn1.running_mean, expected.bn1.running_mean)
    assert torch.equal(repaired.bn1.running_var, expected.bn1.running_var)
    assert torch.equal(repaired.bn2.running_var, model.bn2.running_var)


@pytest.mark.parametrize(("momentum", "count"), [(0.1, 1000), (None, 2)])
def test_pooled_batches_are_no_steps_of_an_exponential_average(
    momentum: float | None, count: int
) -> None:
    model = net(bn=norm(running_var=-1.0, momentum=momentum))
    repaired, _ = nw.repair(model, data=batches(model))
    assert int(repaired.bn.num_batches_tracked) == count


def test_an_average_that_was_not_finished_counts_as_finished() -> None:
    model = net(bn=norm(num_batches_tracked=20))
    repaired, _ = nw.repair(model, unsafe=True, data=batches(model))
    assert int(repaired.bn.num_batches_tracked) == 44
    assert not torch.equal(repaired.bn.running_mean, model.bn.running_mean)


def test_edits_come_before_statistics() -> None:
    """The scale of the first layer is what the second one sees."""
    model = net(bn1=loud(), bn2=norm(running_var=-1.0))
    repaired, _ = nw.repair(model, unsafe=True, data=batches(model))
    assert float(repaired.bn1.weight[2].detach()) == 0
    # A constant channel of variance 0 and of mean β of the first norm.
    assert float(repaired.bn2.running_var[2]) < 1e-12
    assert float(repaired.bn2.running_mean[2]) == pytest.approx(float(model.bn1.bias[2].detach()))


# What is left


def reasons(report: Any) -> list[str]:
    return [e.reason.partition(": ")[2] for e in report.left]


def test_unsafe_edits_are_left_unless_asked_for() -> None:
    model = net(bn=norm(momentum=0.99))
    repaired, report = nw.repair(model)
    assert repaired.bn.momentum == 0.99
    assert "unsafe=True" in reasons(report)[0]
    assert nw.repair(model, unsafe=True).model.bn.momentum == 0.01


def test_statistics_without_data_are_left() -> None:
    _, report = nw.repair(net(bn=norm(running_var=-1.0)))
    assert "data=" in reasons(report)[0]


def test_a_finding_without_an_edit_is_left_with_its_advice() -> None:
    bn = norm()
    bn.weight.data[0] = float("nan")
    _, report = nw.repair(net(bn=bn))
    assert "no edit takes it away: go back to a checkpoint" in reasons(report)[0]


def test_findings_of_another_model_are_left() -> None:
    found = nw.check(net(other=norm(momentum=0.99))).findings
    _, report = nw.repair(net(bn=norm()), found, unsafe=True)
    assert "no such layer" in reasons(report)[0]


def finding(**edit: Any) -> Finding:
    repair = Repair(True, "does", **edit)
    return Finding("NW999", "some-rule", "bn", "error", "high", "fact", "advice", {}, repair)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"attributes": {"eps": 1.0}}, {"attributes": {"eps": 2.0}}),
        ({"tensors": {"weight": torch.ones(8)}}, {"tensors": {"weight": torch.zeros(8)}}),
        ({"tensors": {"running_var": torch.ones(8)}}, {"recalibrate": True}),
        ({"recalibrate": True}, {"tensors": {"running_mean": torch.ones(8)}}),
    ],
)
def test_the_second_edit_of_the_same_is_left(first: Any, second: Any) -> None:
    model = net(bn=norm())
    found = [finding(**first), finding(**second)]
    _, report = nw.repair(model, found, data=batches(model))
    assert [e.action for e in report] == ["fixed", "left"]
    assert "check again" in reasons(report)[0]


def test_a_recalibration_serves_several_findings() -> None:
    model = net(bn=norm())
    _, report = nw.repair(model, [finding(recalibrate=True)] * 2, data=batches(model))
    assert [e.action for e in report] == ["fixed", "fixed"]


def test_constants_are_left() -> None:
    frozen = nw.nn.FrozenBatchNorm(8)
    frozen.running_var[0] = float("nan")
    _, report = nw.repair(net(bn=frozen), data=[torch.randn(4, 8, 2, 2)])
    assert reasons(report) == ["its statistics are constants or not tracked: load them anew"]


def test_a_tensor_that_is_computed_is_left() -> None:
    bn = loud()
    torch.nn.utils.parametrize.register_parametrization(bn, "weight", nn.Identity())
    _, report = nw.repair(net(bn=bn), unsafe=True)
    assert "does not hold the tensors" in reasons(report)[0]


def test_chosen_findings_alone() -> None:
    model = net(bn1=norm(momentum=0.99), bn2=norm(momentum=0.99))
    found = [f for f in nw.check(model).findings if f.layer == "bn2"]
    repaired, report = nw.repair(model, found, unsafe=True)
    assert (repaired.bn1.momentum, repaired.bn2.momentum, len(report)) == (0.99, 0.01, 1)


# What it leaves as it was


@pytest.mark.parametrize("training", [False, True])
def test_a_safe_edit_changes_no_output(training: bool) -> None:
    bn = norm()
    bn.running_mean = bn.running_var = None
    model = net(bn=bn).train(training)
    x = batches(model)[0]
    repaired, report = nw.repair(model)
    assert report.fixed
    assert torch.equal(repaired(x), model(x))


def test_the_model_given_stays_as_it_was() -> None:
    model = negative()
    before = state(model)
    repaired, _ = nw.repair(model, unsafe=True, data=batches(model))
    assert same(before, state(model))
    assert model.bn1.momentum == 0.99
    assert repaired is not model


def test_in_place() -> None:
    model = negative()
    parameter, buffer = model.bn1.weight, model.bn1.running_var
    repaired, _ = nw.repair(model, unsafe=True, data=batches(model), inplace=True)
    assert repaired is model
    assert model.bn1.momentum == 0.01
    assert model.bn1.weight is parameter
    assert model.bn1.running_var is buffer
    assert float(buffer.min()) > 0


def test_in_place_and_to_float32() -> None:
    model = net(bn=norm().half()).requires_grad_(False)
    nw.repair(model, unsafe=True, inplace=True)
    assert {t.dtype for t in model.parameters()} == {torch.float32}
    assert model.bn.running_mean.dtype == torch.float32
    assert not model.bn.weight.requires_grad
    assert model(torch.zeros(2, 8, 3, 3, dtype=torch.float16)).dtype == torch.float16


def test_an_error_undoes_all_edits() -> None:
    model = net(bn1=loud(), bn2=norm(running_var=-1.0, momentum=0.99), bn3=norm().half())
    before = state(model)
    with pytest.raises(NonFiniteError):
        nw.repair(
            model, unsafe=True, data=[torch.full((4, 8, 2, 2), float("inf"))], inplace=True,
            report=nw.check(model),
        )  # fmt: skip
    assert same(before, state(model))
    assert model.bn2.momentum == 0.99


def test_wrapped_models_are_repaired_inside() -> None:
    wrapped = nn.DataParallel(net(bn=norm(momentum=0.99)))
    nw.repair(wrapped, unsafe=True, inplace=True)
    assert wrapped.module.bn.momentum == 0.01


# The report


def test_the_report_counts_and_is_json() -> None:
    _, report = nw.repair(negative(), unsafe=True)
    assert str(report).startswith("1 fixed, 1 left")
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (read["fixed"], read["left"]) == (1, 1)
    assert read["entries"][1]["does"] == "sets momentum=0.01"
    assert report["bn1"].action == "left"


def test_nothing_to_repair() -> None:
    _, report = nw.repair(net(bn=norm()))
    assert len(report) == 0
    assert str(report) == "0 fixed, 0 left"


# Checkpoints


def half() -> nn.Module:
    """A variance near overflow, in a half-precision layer between others."""
    return net(bn1=norm(), bn2=norm(running_var=5000.0).half(), fc=nn.Linear(3, 2))


def test_a_state_dict_is_copied() -> None:
    given = half().state_dict()
    before = {k: v.clone() for k, v in given.items()}
    repaired, report = nw.repair(given, unsafe=True)
    assert report.fixed
    assert same(before, given)
    assert repaired["bn2.running_var"].dtype == torch.float32
    assert repaired["bn1.weight"] is given["bn1.weight"]
    assert repaired._metadata is given._metadata


def test_a_state_dict_in_place_and_nested() -> None:
    inner = OrderedDict((f"module.{k}", v) for k, v in net(bn=loud()).state_dict().items())
    given = {"epoch": 3, "state_dict": inner}
    repaired, _ = nw.repair(given, unsafe=True)
    assert repaired["epoch"] == 3
    assert float(repaired["state_dict"]["module.bn.weight"][2]) == 0
    assert float(inner["module.bn.weight"][2]) == 150
    nw.repair(given, unsafe=True, inplace=True)
    assert float(inner["module.bn.weight"][2]) == 0


def test_a_mapping_that_is_no_dict() -> None:
    repaired, report = nw.repair(MappingProxyType(net(bn=loud()).state_dict()), unsafe=True)
    assert report.fixed
    assert float(repaired["bn.weight"][2]) == 0


def test_what_only_a_module_has_is_left_in_a_checkpoint() -> None:
    found = nw.check(net(bn=norm(momentum=0.99, running_var=-1.0))).findings
    _, report = nw.repair(net(bn=norm()).state_dict(), found, unsafe=True)
    assert "needs the model" in reasons(report)[0]
    assert "attribute of the module" in reasons(report)[1]


def raw(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Header and bytes of each tensor."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    return header, {
        name: data[8 + n + e["data_offsets"][0] : 8 + n + e["data_offsets"][1]]
        for name, e in header.items()
        if name != "__metadata__"
    }


@pytest.mark.parametrize("model", [net(fc=nn.Linear(3, 5), bn=loud(), other=norm()), half()])
def test_a_safetensors_file(model: nn.Module, tmp_path: Path) -> None:
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(model.state_dict(), source, {"format": "pt", "note": "Größe"})
    repaired, report = nw.repair(source, unsafe=True, output=output)
    assert repaired == str(output)
    assert report.facts["output"] == str(output)
    assert nw.check(output, select="NW105").findings == ()
    assert nw.check(output, select="NW114").findings == ()
    (head, old), (new_head, new) = raw(source), raw(output)
    assert new_head["__metadata__"] == head["__metadata__"]
    assert list(new_head) == list(head)
    changed = {name for name in old if old[name] != new[name]}
    owners = {e.name for e in report.fixed}
    assert changed
    assert {name.rpartition(".")[0] for name in changed} == owners
    library = load_file(output)
    assert all(torch.equal(library[k], model.state_dict()[k]) for k in old if k not in changed)


def test_a_file_of_torch_save(tmp_path: Path) -> None:
    model = net(bn=loud(), fc=nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    source = tmp_path / "a.pt"
    whole = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 7}
    torch.save(whole, source)
    nw.repair(source, unsafe=True, output=source)
    read = torch.load(source, weights_only=True)
    assert read["step"] == 7
    assert read["optim"]["param_groups"][0]["lr"] == 0.5
    assert read["model"]._metadata == model.state_dict()._metadata
    changed = {k for k, v in read["model"].items() if not torch.equal(v, whole["model"][k])}
    assert changed == {"bn.weight"}
    assert float(read["model"]["bn.weight"][2]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    save_file(net(bn=loud()).state_dict(), tmp_path / "model.safetensors")
    output = tmp_path / "out" / "model.safetensors"
    output.parent.mkdir()
    nw.repair(tmp_path, unsafe=True, output=output)
    assert float(load_file(output)["bn.weight"][2]) == 0


def saved(folder: Path) -> Path:
    torch.save(net(bn=loud()).state_dict(), folder / "a.pt")
    return folder / "a.pt"


def test_a_path_needs_an_output(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="output="):
        nw.repair(saved(tmp_path))


def test_a_model_takes_no_output(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="output="):
        nw.repair(net(bn=norm()), output=tmp_path / "a.pt")


def test_data_need_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without code"):
        nw.repair(saved(tmp_path), data=[torch.zeros(2, 8)], output=tmp_path / "b.pt")


def test_the_format_stays(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keeps"):
        nw.repair(saved(tmp_path), unsafe=True, output=tmp_path / "b.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_several_files_are_refused(tmp_path: Path) -> None:
    save_file(net(bn=loud()).state_dict(), tmp_path / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(net(bn=norm()).state_dict(), "model-1.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="several files"):
        nw.repair(tmp_path, unsafe=True, output=tmp_path / "b.safetensors")


def test_a_program_is_refused(tmp_path: Path) -> None:
    model = net(bn=loud()).eval()
    torch.export.save(torch.export.export(model, (torch.zeros(2, 8, 3, 3),)), tmp_path / "a.pt2")
    with pytest.raises(InputError, match="'exported'"):
        nw.repair(tmp_path / "a.pt2", [], output=tmp_path / "b.pt2")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"bn": net(bn=loud()).state_dict(), "more": Hostile()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError):
        nw.repair(tmp_path / "a.pt", unsafe=True, output=tmp_path / "b.pt")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "b.pt").exists()


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="writable"):
        nw.repair(saved(tmp_path), unsafe=True, output=tmp_path / "none" / "b.pt")


def test_a_deep_copy_that_fails_is_an_error() -> None:
    model = net(bn=norm())
    model.lock = __import__("threading").Lock()
    with pytest.raises(InputError, match="deep copy"):
        nw.repair(model)
