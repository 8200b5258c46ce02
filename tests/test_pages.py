"""Pages as data: what becomes of cells, charts and names; test_report_browser.py looks at them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from normwise.errors import OutputError
from normwise.pages import Axis, Chart, Column, Page, Section, Table
from normwise.pages.cells import cell, finite, shown
from normwise.pages.charts import MOST_NAMES, MOST_POINTS, drawing
from normwise.pages.training import curves, percentiles

ROOT = Path(__file__).parent.parent
LAYER, VALUE = Axis("layer", "layer", "layer"), Axis("value", "value")


def scatter(values: list[Any], **options: Any) -> Chart:
    rows = [{"layer": f"bn{i}", "value": v} for i, v in enumerate(values)]
    return Chart("scatter", "title", "description", rows, **{"x": LAYER, "y": VALUE, **options})


def marks(chart: Chart) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = drawing(chart).spec["data"]["values"]
    return found


# Cells


@pytest.mark.parametrize(
    ("value", "text", "key"),
    [
        (None, "", None),
        (1.23456, "1.23", "1.23456"),
        (7, "7", "7.0"),
        (True, "True", None),
        (math.inf, "inf", "inf"),
        (math.nan, "nan", None),
        (10**400, str(10**400), "inf"),
        ((2.0, 1.5), "2, 1.5", "1.5"),
        (["a", 1.0], "a, 1", "1.0"),
        ({"share": 0.25, "of": [1, 2]}, "share = 0.25, of = 1, 2", None),
        ("text", "text", None),
    ],
)
def test_a_cell_reads_and_sorts(value: Any, text: str, key: str | None) -> None:
    assert (cell(value).text, cell(value).key) == (text, key)


@pytest.mark.parametrize("code", [0x00, 0x1B, 0x7F, 0x85, 0x200E, 0x2028, 0x202E, 0x2066, 0xD800])
def test_what_cannot_be_seen_is_spelled_out(code: int) -> None:
    assert shown(f"a{chr(code)}b").isprintable()
    assert shown(f"a{chr(code)}b") == "a" + chr(code).encode("unicode_escape").decode() + "b" or (
        code == 0xD800 and shown(chr(code)) == r"\ud800"
    )


@pytest.mark.parametrize("value", [None, "1", True, math.nan, math.inf, 10**400])
def test_what_cannot_be_drawn(value: Any) -> None:
    assert finite(value) is None


# Charts


def test_what_is_not_finite_is_not_drawn_and_that_is_said() -> None:
    drawn = drawing(scatter([1.0, math.nan, None, -math.inf, 2]))
    assert [m["y"] for m in drawn.spec["data"]["values"]] == [1.0, 2.0]
    assert drawn.notes == ("2 of 5 are not drawn: not finite",)  # None was never there


def test_a_logarithm_leaves_out_zeros_and_says_so() -> None:
    drawn = drawing(scatter([1e-7, 0.0, -1.0], y=Axis("value", "value", log=True)))
    assert [m["y"] for m in drawn.spec["data"]["values"]] == [1e-7]
    assert drawn.notes == ("2 of 3 are not drawn: not above 0 or not finite",)


def test_names_stand_upright_while_there_is_room() -> None:
    few, many = (drawing(scatter([1.0] * n)).spec for n in (MOST_NAMES, MOST_NAMES + 1))
    assert few["layer"][0]["encoding"]["y"]["field"] == "x"
    assert few["height"] > 500
    assert many["layer"][0]["encoding"]["x"]["field"] == "x"
    assert many["layer"][0]["encoding"]["x"]["axis"]["labels"] is False
    assert many["height"] < 500


def test_a_long_run_is_thinned_evenly_and_that_is_said() -> None:
    places = MOST_POINTS
    rows = [{"step": i, "v": i, "name": n} for i in range(places) for n in ("a", "b", "c")]
    chart = Chart("line", "t", "d", rows, x=Axis("step", "step"), y=Axis("v", "v"), layer="name")
    kept = marks(chart)
    assert len(kept) <= MOST_POINTS + 6
    assert {m["l"] for m in kept} == {"a", "b", "c"}
    assert kept[0]["x"] == 0
    assert kept[-1]["x"] == pytest.approx(places - 1)
    assert drawing(chart).notes == (f"one step in 3 is drawn, of {3 * places:,} values",)


def test_severities_and_given_values_keep_their_colours() -> None:
    rows = [{"layer": "a", "value": 1, "severity": s} for s in ("info", "error")]
    severity = Axis("severity", "severity", "severity")
    color = drawing(Chart("bar", "t", "d", rows, x=LAYER, y=VALUE, color=severity)).spec
    assert color["layer"][0]["encoding"]["color"]["scale"]["domain"] == ["error", "warning", "info"]
    scales = []
    for present in (("a", "b"), ("b",)):
        rows = [{"layer": "x", "value": 1, "kind": kind} for kind in present]
        kind = Axis("kind", "kind", "category", values=("a", "b"))
        spec = drawing(Chart("bar", "t", "d", rows, x=LAYER, y=VALUE, color=kind)).spec
        scale = spec["layer"][0]["encoding"]["color"]["scale"]
        scales.append(dict(zip(scale["domain"], scale["range"], strict=True)))
    assert scales[0]["b"] == scales[1]["b"] != scales[0]["a"]


def test_names_never_become_part_of_an_expression() -> None:
    evil = "'] + evil() + ['"
    rows = [{"layer": evil, "value": 1.0, evil: 2.0}]
    chart = Chart("scatter", "t", "d", rows, x=LAYER, y=Axis(evil, "y"), choose=True)
    spec = drawing(chart).spec
    assert spec.pop("data")["values"][0]["l"] == evil
    menu = spec["params"].pop()
    assert menu["bind"]["options"] == [evil]
    assert "evil" not in json.dumps(spec)


def test_training_has_a_band_and_curves() -> None:
    rows = [{"step": i, "name": "bn", "a": 0.0, "b": 1.0, "c": 2.0, "g": None} for i in range(3)]
    band = percentiles(rows, "t", "d", ("a", "b", "c"), ("low", "middle", "high"))
    assert marks(band)[0] == {"x": 0.0, "y": 1.0, "l": "bn", "lo": 0.0, "hi": 2.0}
    lines = curves(rows, "t", "d", {"a": "first", "g": "never"}, label="v")
    assert {m["c"] for m in marks(lines)} == {"first"}
    assert all(chart.choose and chart.layer_key == "name" for chart in (band, lines))


@pytest.mark.parametrize("kind", ["bar", "scatter", "line", "histogram"])
@pytest.mark.parametrize("more", [{}, {"choose": True}, {"rules": [(1.0, "one")]}])
def test_vega_lite_takes_every_kind(kind: Any, more: dict[str, Any]) -> None:
    vl_convert = pytest.importorskip("vl_convert")
    rows = [{"v": i % 3, "w": i + 1.0, "layer": "a", "k": "b" * i} for i in range(5)]
    chart = Chart(
        kind, "t", "d", rows, x=Axis("v", "v"), y=Axis("w", "w", log=kind == "line"),
        color=Axis("k", "k", "category"), layer="layer", **more,
    )  # fmt: skip
    assert vl_convert.vegalite_to_vega(drawing(chart).spec)["marks"]


# Pages

TABLE = Table(
    "Table",
    [Column("layer", "name", "layer"), Column("v", "v", "number"), Column("none", "never there")],
    [{"layer": "features.denseblock.0.bn", "v": 0.123456}, {"layer": "<b>&", "v": None}],
)


def test_a_table_shows_columns_with_something_in_them() -> None:
    html = Page("t", [Section("s", tables=[TABLE])]).fragment()
    assert re.findall("<th>(.*?)</th>", html) == ["name", "v"]
    assert re.findall("<td>(.*?)</td>", html) == [
        "features.denseblock.0.bn",
        "0.123",
        "&lt;b&gt;&amp;",
        "",
    ]


def test_names_break_after_dots_and_stay_text() -> None:
    html = Page("t", [Section("s", tables=[TABLE])]).html()
    assert "<bdi>features.<wbr>denseblock.<wbr>0.<wbr>bn</bdi>" in html
    assert "<bdi>&lt;b&gt;&amp;</bdi>" in html
    assert "<b>" not in html


def test_ids_of_a_page_are_its_own() -> None:
    sections = [Section(title, tables=[TABLE]) for title in ("fold", "fold", "Top", "", "main")]
    ids = re.findall(r' id="([^"]*)"', Page("t", sections).html())
    assert len(ids) == len(set(ids))


def test_data_of_charts_cannot_end_their_element() -> None:
    evil = "</script><!--<script>\u2028"
    rows = [{"layer": evil, "value": 1.0}]
    chart = Chart("bar", "t", evil, rows, x=LAYER, y=VALUE)
    html = Page(evil, [Section(evil, [evil], ("good", evil), [(evil, evil)], [chart])]).html()
    [data] = re.findall(r'id="data">(.*?)</script>', html, re.DOTALL)
    assert json.loads(data)[0]["layers"] == ["</script><!--<script>\\u2028"]
    assert evil not in html
    assert "<!--" not in data


def test_the_policy_has_the_hash_of_each_script_and_no_other() -> None:
    import base64
    import hashlib

    html = Page("t", [Section("s", charts=[scatter([1.0])])]).html()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digests = [hashlib.sha256(s.encode()).digest() for s in scripts]
    hashes = [f"&#39;sha256-{base64.b64encode(d).decode()}&#39;" for d in digests]
    assert f"script-src {' '.join(hashes)};" in policy[1]
    assert "default-src 'none'" in policy[1]
    assert "unsafe-eval" not in policy[1]


def test_a_page_without_charts_has_no_library() -> None:
    html = Page("t", [Section("s", tables=[TABLE])]).html()
    assert "vegaEmbed =" not in html
    assert len(html) < 40_000


def test_a_page_is_utf8_whatever_the_names_are(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    Page("ü", [Section("\ud800", tables=[Table("t", TABLE.columns, [{"layer": "\udfff"}])])]).save(
        path
    )
    assert r"\udfff" in path.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="writable"):
        Page("t", []).save(tmp_path / "none" / "a.html")


def test_a_wheel_has_the_files_of_the_page(tmp_path: Path) -> None:
    command = ["pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [sys.executable, "-m", *command, "-C", "wheel.cmake=false", "-w", str(tmp_path)],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    [wheel] = tmp_path.glob("*.whl")
    packed = {Path(n).name for n in zipfile.ZipFile(wheel).namelist() if "/pages/assets/" in n}
    assert packed == {p.name for p in (ROOT / "src/normwise/pages/assets").iterdir()}
    assert len(packed) == 6
