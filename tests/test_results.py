"""What tools give back: reports print, save and unpack alike, and hostile names stay text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from normwise.errors import OutputError
from normwise.results import Entry, Report, Result


class Some(Report):
    title: ClassVar[str] = "some report"
    columns: ClassVar[tuple[str, ...]] = ("error",)


REPORT = Some(
    [
        Entry("layer1.bn", "folded", into="layer1.conv", facts={"error": 1.25e-7}),
        Entry("<b>bn</b>", "left", reason="shared-weight", facts={"error": float("nan")}),
    ],
    {"found": 2, "shift": torch.tensor([1.0, float("inf")])},
)


def test_a_result_unpacks() -> None:
    model, report = Result("model", REPORT)
    assert (model, report) == ("model", REPORT)


def test_an_entry_is_found_by_name() -> None:
    assert REPORT["layer1.bn"].into == "layer1.conv"
    with pytest.raises(KeyError):
        REPORT["layer1"]


def test_a_report_prints_all_entries() -> None:
    text = str(REPORT)
    assert "1 folded, 1 left" in text
    assert "shared-weight" in text
    assert "1.25e-07" in text


def test_a_report_is_json() -> None:
    read = json.loads(json.dumps(REPORT.to_dict(), allow_nan=False))
    assert read["shift"] == [1.0, None]
    assert read["entries"][0]["into"] == "layer1.conv"
    assert read["entries"][1]["error"] is None


def test_names_are_text_in_html() -> None:
    assert "<b>bn</b>" not in REPORT._repr_html_()
    assert "&lt;b&gt;bn&lt;/b&gt;" in REPORT._repr_html_()


def test_saved_html_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    REPORT.save_html(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.rstrip().endswith("</html>")
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="(?!#)', markup) == []
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


def test_html_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="writable"):
        REPORT.save_html(tmp_path / "none" / "a.html")
