"""``check``: configuration, reports, what it takes, and the table of conventions."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor import net, norm
from safetensors.torch import save_file
from torch import nn

import normwise as nw
from normwise.doctor import Config, Finding, all_rules, pages, rule
from normwise.errors import CheckpointError, InputError
from normwise.interop.conventions import CONVENTIONS, convention

pytestmark = pytest.mark.usefixtures("alone")


def faulty() -> nn.Module:
    """Two rules fire in each layer."""
    held = {"momentum": 0.99, "running_var": -1.0}
    return net(stem=norm(**held), head=norm(**held))


def found(**kwargs: Any) -> set[tuple[str, str]]:
    return {(f.layer, f.code) for f in nw.check(faulty(), **kwargs).findings}


EVERYTHING = {(layer, code) for layer in ("stem", "head") for code in ("NW102", "NW107")}


# Configuration


@pytest.mark.parametrize(
    ("kwargs", "codes"),
    [
        ({}, {"NW102", "NW107"}),
        ({"select": "NW102"}, {"NW102"}),
        ({"select": ["foreign-momentum"]}, {"NW107"}),
        ({"select": "NW1"}, {"NW102", "NW107"}),
        ({"select": "NW2"}, set()),
        ({"select": "ALL", "ignore": ["NW102"]}, {"NW107"}),
        ({"ignore": ["negative-variance", "NW107"]}, set()),
    ],
    # Not of the sets: their order changes from process to process, and those must agree on ids.
    ids=lambda v: str(sorted(v)) if isinstance(v, set) else str(v),
)
def test_select_and_ignore(kwargs: Any, codes: set[str]) -> None:
    assert found(**kwargs) == {(layer, code) for layer, code in EVERYTHING if code in codes}


def test_findings_of_a_layer_are_dropped() -> None:
    per_layer = {"st*": ["NW107"], "none": "ALL"}
    assert found(per_layer=per_layer) == EVERYTHING - {("stem", "NW107")}


def test_rules_that_are_ignored_do_not_run() -> None:
    facts = nw.check(faulty(), ignore="NW1").facts
    assert not [code for code in facts["rules"] if code.startswith("NW1")]


@pytest.mark.parametrize("name", ["NW9", "nw102", "", "no-rule", 7])
@pytest.mark.parametrize("where", ["select", "ignore", "per_layer"])
def test_a_name_that_is_no_rules(name: Any, where: str) -> None:
    given = {"stem": [name]} if where == "per_layer" else [name]
    with pytest.raises(InputError, match="names rules by code"):
        nw.check(faulty(), **{where: given})


def write(folder: Path, text: str) -> Path:
    path = folder / "pyproject.toml"
    path.write_text(text)
    return path


TABLE = """
[tool.normwise.check]
select = ["NW1"]
ignore = ["NW102"]
[tool.normwise.check.per-layer-ignores]
"head" = ["NW107"]
"""


def test_a_configuration_file(tmp_path: Path) -> None:
    config = Config.from_pyproject(write(tmp_path, TABLE))
    assert found(config=config) == {("stem", "NW107")}


def test_arguments_come_on_top_of_a_file(tmp_path: Path) -> None:
    config = Config.from_pyproject(write(tmp_path, TABLE))
    assert found(config=config, select="NW102") == set()
    assert found(config=config, per_layer={"head": []}) == {("stem", "NW107"), ("head", "NW107")}


def test_the_nearest_file_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, TABLE)
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert Config.from_pyproject().ignore == ("NW102",)


@pytest.mark.parametrize("text", ["", "[tool.other]\na = 1\n", "[tool.normwise]\n"])
def test_a_file_without_the_table(text: str, tmp_path: Path) -> None:
    assert Config.from_pyproject(write(tmp_path, text)) == Config()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[tool.normwise.check]\nselcet = []\n", "selcet"),
        ("[tool.normwise.check]\nselect = ['NW9']\n", "NW9"),
        ("[tool.normwise]\ncheck = 3\n", "table"),
        ("[tool.normwise.check]\nper-layer-ignores = 3\n", "per-layer-ignores"),
        ("[tool.normwise.check\n", "TOML"),
    ],
)
def test_a_faulty_file(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        Config.from_pyproject(write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="readable"):
        Config.from_pyproject(tmp_path / "none.toml")


def test_a_rule_by_code_and_by_name() -> None:
    assert rule("NW102") is rule("negative-variance")
    with pytest.raises(InputError, match="NW999"):
        rule("NW999")


# Reports


def test_findings_are_sorted_worst_first_then_by_layer() -> None:
    report = nw.check(faulty())
    assert [(f.layer, f.code) for f in report.findings] == [
        ("stem", "NW102"), ("head", "NW102"), ("stem", "NW107"), ("head", "NW107"),
    ]  # fmt: skip
    assert [f.code for f in report.at_least("error")] == ["NW102"] * 2
    assert report.at_least("info") == report.findings


def test_a_report_prints_findings_advice_and_what_did_not_run() -> None:
    text = str(nw.check(faulty()))
    assert "stem: NW102 negative-variance (error): running_var is negative" in text
    assert "recalibrate on the data" in text
    assert "[*]" in text
    assert "[unsafe fix]" in text
    assert "2 norms of _Net: 2 errors, 2 warnings" in text
    assert "not run: NW116 (the optimizer: pass optimizer=)" in text


def test_a_report_without_findings() -> None:
    report = nw.check(net(bn=norm()))
    assert str(report).startswith("1 norm of _Net: no findings")
    assert len(report) == 0


def test_a_report_in_html(tmp_path: Path) -> None:
    report = nw.check(net(**{"<i>": norm(momentum=0.99)}))
    assert "&lt;i&gt;" in report._repr_html_()
    assert "NW107" in report._repr_html_()
    report.save_html(tmp_path / "a.html")
    assert "<i>" not in (tmp_path / "a.html").read_text()


def test_a_report_is_json() -> None:
    read = json.loads(json.dumps(nw.check(faulty()).to_dict(), allow_nan=False))
    first = read["findings"][0]
    assert (first["code"], first["layer"], first["fix"]) == ("NW102", "stem", "safe")
    assert first["evidence"]["channels"] == 8
    assert read["norms"] == 2
    assert read["skipped"]["NW116"]


def test_an_entry_a_finding() -> None:
    report = nw.check(faulty())
    assert [(e.name, e.action, e.reason) for e in report] == [
        (f.layer, f.severity, f"{f.code} {f.rule}") for f in report.findings
    ]


def test_findings_compare_by_what_they_say() -> None:
    a, b = (nw.check(faulty()).findings[0] for _ in range(2))
    assert isinstance(a, Finding)
    assert a == b


# What it takes


def test_a_wrapped_model() -> None:
    report = nw.check(nn.DataParallel(faulty()))
    assert {f.layer for f in report.findings} == {"stem", "head"}


def test_a_lazy_model() -> None:
    assert nw.check(net(bn=nn.LazyBatchNorm2d())).findings == ()


def test_a_model_on_the_meta_device() -> None:
    assert nw.check(net(bn=nn.BatchNorm2d(4, device="meta"))).findings == ()


def test_layers_without_channels() -> None:
    assert nw.check(net(bn=nn.BatchNorm2d(0))).findings == ()


@pytest.mark.parametrize("make", ["file", "folder", "pickle", "state dict", "nested"])
def test_checkpoints_in_all_forms(make: str, tmp_path: Path) -> None:
    state = net(bn=norm(running_var=-1.0)).state_dict()
    source: Any = tmp_path / "model.safetensors"
    if make in ("file", "folder"):
        save_file(state, source)
        source = tmp_path if make == "folder" else str(source)
    elif make == "pickle":
        source = tmp_path / "a.pt"
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, source)
    else:
        source = state if make == "state dict" else {"model": state, "epoch": 3}
    report = nw.check(source)
    assert [(f.layer, f.code) for f in report.findings] == [("bn", "NW102")]


def test_checkpoints_as_peers(tmp_path: Path) -> None:
    here, there = net(bn=norm()), net(bn=norm())
    there.bn.running_mean.add_(1)
    save_file(there.state_dict(), tmp_path / "rank1.safetensors")
    (one,) = nw.check(here, peers=[tmp_path / "rank1.safetensors"], select="NW113").findings
    assert one.evidence["peer"].endswith("rank1.safetensors")


def test_only_the_norms_of_a_file_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(fc=nn.Linear(256, 256), bn=norm(), ln=nn.LayerNorm(8))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    read = []
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, views, at: read.append(len(views[0])) or preadv(fd, views, at)
    )
    assert nw.check(tmp_path / "a.safetensors").facts["norms"] >= 1
    assert sum(read) < 8192
    assert (tmp_path / "a.safetensors").stat().st_size > 4 * 256 * 256


@pytest.mark.parametrize(
    ("source", "kwargs", "match"),
    [
        (3, {}, "a module, a state dict or the path"),
        ({}, {}, "no tensor"),
        ({"a": 1}, {}, "no tensor"),
        (net(bn=norm()).state_dict(), {"data": [torch.zeros(2, 8, 4, 4)]}, "without code"),
        (net(bn=norm()), {"batches": 0}, "batches"),
        (net(bn=norm()), {"batches": True}, "batches"),
        (net(bn=norm()), {"data": []}, "none"),
        (net(bn=norm()), {"framework": "caffe9"}, "framework"),
        (net(bn=norm()), {"data": [torch.zeros(2, 3)], "select": "NW3"}, "must run on the data"),
        (net(bn=norm()), {"example_inputs": torch.zeros(2, 3)}, "must run on the example"),
    ],
    ids=str,
)
def test_what_does_not_fit(source: Any, kwargs: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        nw.check(source, **kwargs)


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="a\\.safetensors"):
        nw.check(tmp_path / "a.safetensors")


# The table of conventions


def test_conventions_are_found_by_name_in_any_case() -> None:
    assert convention("Keras") is convention("tensorflow") is CONVENTIONS["keras"]
    assert convention("PyTorch").eps == torch.nn.BatchNorm2d(1).eps
    assert convention("torch").momentum == torch.nn.BatchNorm2d(1).momentum


@pytest.mark.parametrize("name", ["", "mxnet9", None, 3])
def test_an_unknown_framework(name: Any) -> None:
    with pytest.raises(InputError, match="one of torch, keras"):
        convention(name)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_convention_is_whole(name: str) -> None:
    one = CONVENTIONS[name]
    assert 0 < one.eps < 0.01
    assert one.momentum is None or 0 < one.momentum <= 0.5
    assert one.axis in (1, -1)
    assert one.source.startswith("https://")
    assert len({one.weight, one.bias, one.mean, one.var}) == 4


# Documentation


def test_the_pages_of_the_rules_are_up_to_date() -> None:
    """Otherwise: python -m normwise.doctor.pages docs."""
    docs = Path(__file__).parent.parent / "docs"
    wanted = pages.files(docs)
    assert {p for p, text in wanted.items() if not p.exists() or p.read_text() != text} == set()
    assert set((docs / "rules").glob("*.md")) == set(wanted) - {docs / "doctor.md"}


def test_pages_are_written(tmp_path: Path) -> None:
    (tmp_path / "doctor.md").write_text(
        f"before\n{pages.BEGIN}\nof yesterday\n{pages.END}\nafter\n"
    )
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "nw999.md").write_text("of a rule that is gone")
    pages.main(str(tmp_path))
    overview = (tmp_path / "doctor.md").read_text()
    assert overview.startswith("before\n")
    assert overview.endswith("\nafter\n")
    assert "of yesterday" not in overview
    assert "[NW102](rules/nw102.md) | negative-variance | error |" in overview
    assert len(list((tmp_path / "rules").iterdir())) == len(all_rules())


# The example


def test_the_example_finds_and_repairs(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "doctor.py"))
    rows = example["main"](["--epochs", "2"])
    expected = {"NW101", "NW103", "NW107", "NW108"}
    assert expected <= set().union(*(codes for _, _, codes in rows.values()))
    assert all(after > 0.9 and after >= before for before, after, _ in rows.values())
    assert "as trained" in capsys.readouterr().out


def test_rules_are_in_order() -> None:
    assert [r.code for r in all_rules()] == sorted(r.code for r in all_rules())
