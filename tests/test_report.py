"""Several results on one page, and results read back from JSON that anybody may have written."""

from __future__ import annotations

import json
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normwise
import normwise as nw
from normwise import report
from normwise.doctor.finding import Finding, Repair
from normwise.doctor.report import CheckReport
from normwise.errors import InputError
from normwise.report import reading
from normwise.results import Report


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """One of each kind."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).eval()
    x = torch.randn(4, 2, 8, 8)
    repair = Repair(True, "the variance becomes 1", {"running_var": torch.ones(4)})
    findings = [
        Finding("NW101", "a-rule", "1", "error", "high", "fact", "advice", {"at": [1, 2]}, repair),
        Finding("NW201", "b-rule", "", "info", "low", "fact", "advice", {"share": float("nan")}),
    ]
    folded = nw.fold(net, x, seconds=0)
    return {
        "check": CheckReport(findings, {"norms": 2, "source": "net", "skipped": {"NW301": "data"}}),
        "fold": folded,
        "recalibration": nw.recalibrate(net, [x], metric=lambda y, _: {"mean": y.mean()}),
        "convert": nw.convert(net, "normwise", x),
        "int8": nw.quantization_report(folded.model, x, original=net),
        "equalize": nw.equalize(folded.model, x),
    }


def of(result: Any) -> Report:
    found = getattr(result, "report", result)
    assert isinstance(found, Report)
    return found


def through_json(data: Any) -> Any:
    return json.loads(json.dumps(data, allow_nan=False))


KINDS = ("check", "fold", "recalibration", "convert", "int8", "equalize")


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_comes_back_from_json(results: dict[str, Any], kind: str) -> None:
    before = of(results[kind])
    after = report.from_dict(through_json(before.to_dict()))
    assert type(after) is type(before)
    assert after.summary() == before.summary()
    assert through_json(after.to_dict()) == through_json(before.to_dict())
    assert after._repr_html_() == before._repr_html_()


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_of_nothing_but_none_can_be_shown(results: dict[str, Any], kind: str) -> None:
    """JSON has None where a figure was not finite."""

    def emptied(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: emptied(v) for k, v in value.items()}
        if isinstance(value, list):
            return [emptied(v) for v in value]
        return None if isinstance(value, float) else value

    data = emptied(through_json(of(results[kind]).to_dict()))
    assert report.compose(report.from_dict(data)).html().endswith("</html>\n")


def test_every_report_of_the_package_can_be_read() -> None:
    for module in pkgutil.walk_packages(normwise.__path__, "normwise."):
        if not module.name.endswith(("_native", "__main__")):
            import_module(module.name)
    defined = {kind.__module__ for kind in reading._kinds()}
    assert {m for m in defined if not m.startswith(reading.MODULES)} == set()
    titles = [kind.title for kind in reading._kinds()]
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("kind", KINDS)
def test_the_charts_of_a_report_have_data(results: dict[str, Any], kind: str) -> None:
    [section] = of(results[kind]).sections()
    assert [t.title for t in section.tables]
    assert (
        kind == "equalize"
        or any(len(chart.rows) > 1 for chart in section.charts)
        or (
            kind == "convert"  # all of one kind into one kind: a chart would be one bar
        )
    )


# Composing


def test_a_page_has_a_section_for_each_result(results: dict[str, Any], tmp_path: Path) -> None:
    report.save(tmp_path / "a.html", *results.values(), title="All & more")
    page = (tmp_path / "a.html").read_text()
    assert "<title>All &amp; more</title>" in page
    for title in KINDS:
        assert f'<a href="#{title}">{title}</a>' in page
        assert f'<h2 id="{title}">{title}</h2>' in page


def test_the_same_kind_twice_has_two_anchors(results: dict[str, Any]) -> None:
    page = report.compose(results["fold"], results["fold"]).html()
    assert '<a href="#fold-2">' in page
    assert 'id="fold-2"' in page


@pytest.mark.parametrize("wrong", [(), (nn.ReLU(),), ({"title": "fold"},)])
def test_a_page_of_something_else(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match=r"a page .*; got .*\. Try:"):
        report.compose(*wrong)


@pytest.mark.usefixtures("threads")
def test_the_example_makes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.report import main

    torch.set_num_threads(1)  # two that wait for each other take 15 times as long on a busy machine
    page = main(["--steps", "10", "--out", str(tmp_path / "a.html")]).read_text()
    assert re.match(r"[1-9]\d* findings before, ", capsys.readouterr().out)
    ids = [f'id="{name}"' for name in ("check", "recalibration", "check-2", "fold", "int8")]
    assert [name for name in ids if name not in page] == []


# JSON of strangers

ENTRY = {"name": "bn", "action": "folded", "into": None, "reason": None}
FINDING = {
    "code": "NW101", "rule": "r", "layer": "bn", "severity": "error", "confidence": "high",
    "message": "m", "remedy": "r", "evidence": {}, "fix": None, "does": None,
}  # fmt: skip
CHECK = {"title": "check", "norms": 1, "source": "x"}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "fold",
        {},
        {"title": "none"},
        {"title": ["fold"]},
        {"title": "report", "entries": []},
        {"title": "fold"},
        {"title": "fold", "entries": None},
        {"title": "fold", "entries": [1]},
        {"title": "fold", "entries": [{"name": "bn"}]},
        {"title": "fold", "entries": [{**ENTRY, "reason": "no such reason"}]},
        {"title": "fold", "entries": [ENTRY], "parameters": [1]},
        {"title": "fold", "entries": [ENTRY], "parameters": "ab"},
        {"title": "fold", "entries": [{**ENTRY, "reason": {"a": 1}}]},
        {"title": "recalibration", "entries": []},
        {"title": "int8", "entries": [], "snr_tensor": "1e999x", "snr_channel": 1},
        {"title": "int8", "entries": [{**ENTRY, "peak": 3}], "snr_tensor": 1, "snr_channel": 1},
        {**CHECK, "findings": [{}]},
        {**CHECK, "findings": [{**FINDING, "severity": "fatal"}]},
        {**CHECK, "findings": [{**FINDING, "more": 1}]},
        {**CHECK, "findings": [FINDING], "skipped": []},
        {"title": "check", "findings": []},
        {"title": "demo"},
        {"title": "demo", "networks": {"none": {"looks": [1]}}},
    ],
    ids=repr,
)
def test_what_is_no_result_is_refused(data: Any) -> None:
    with pytest.raises(InputError, match=r"a result is JSON that normwise wrote .*; got "):
        report.from_dict(data)


def test_names_in_json_are_text() -> None:
    evil = "<script>alert(1)</script>"
    data = {**CHECK, "source": evil, "findings": [{**FINDING, "layer": evil, "message": evil}]}
    page = report.compose(report.from_dict(data), title=evil).html()
    assert evil not in page


@pytest.mark.parametrize("huge", [10**400, -(10**400), 1e308])
def test_numbers_of_any_size_can_be_shown(huge: float) -> None:
    entry = {**ENTRY, "error": huge, "error64": huge}
    page = report.compose(report.from_dict({"title": "fold", "entries": [entry]})).html()
    assert "NaN" not in page.split('id="data">')[1].split("</script>")[0]


def test_a_file_holds_one_result_or_several(results: dict[str, Any], tmp_path: Path) -> None:
    one, two = (of(results[kind]).to_dict() for kind in ("fold", "check"))
    path = tmp_path / "a.json"
    for written, titles in ((one, ["fold"]), ([one, two], ["fold", "check"])):
        path.write_text(json.dumps(written))
        assert [section.title for r in report.load(path) for section in r.sections()] == titles


def test_a_result_of_the_demo_comes_back() -> None:
    from tests.test_report_browser import demo_run

    [section] = report.from_dict(demo_run(30)).sections()
    assert section.verdict is not None
    assert section.verdict[0] == "good"
    assert [len(chart.rows) for chart in section.charts] == [90, 90, 58]
    bad = demo_run(30)
    bad["agreement"] = {**bad["agreement"], "passed": False}
    bad["agreement"]["verified_test_loss"] = {"largest": None, "step": 2}
    [section] = report.from_dict(bad).sections()
    assert section.verdict is not None
    assert section.verdict[0] == "bad"
    assert "not finite" in section.verdict[1]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5_000,
        b"NaN",
        b'{"title": "fold", "entries": [' + b'{"name": ' + b"[" * 900 + b"]" * 900 + b"}]}",
    ],
    ids=["empty", "cut", "no text", "deep", "deep objects", "long int", "nan", "deep name"],
)
def test_a_file_of_something_else(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(InputError, match="a result is JSON that normwise wrote"):
        report.load(tmp_path / "a.json")


def test_a_file_that_is_not_there_or_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="No such file"):
        report.load(tmp_path / "none.json")
    monkeypatch.setattr(reading, "LARGEST", 9)
    (tmp_path / "a.json").write_text(" " * 10)
    with pytest.raises(InputError, match="with more than"):
        report.load(tmp_path / "a.json")
