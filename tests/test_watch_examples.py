"""examples/watch.py and examples/pictures.py run, and say what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from normwise.tools.watch import WatchRecord

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_watch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, picture = tmp_path / "w.parquet", tmp_path / "w.svg"
    run(monkeypatch, "watch.py", "--steps", 9, "--every", 4, "--rows", rows, "--picture", picture)
    record = WatchRecord.load(rows)
    assert [e.name for e in record] == ["1", "4", "7"]
    assert record.series("7")[0] == [0, 4, 8]
    assert "svg" in picture.read_text()
    assert "3 watched" in capsys.readouterr().out


def test_what_watch_costs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "watch.py", "--cost", 1)
    out = capsys.readouterr().out
    assert "digits network, 3 norms" in out
    assert "ResNet-18, 20 norms" in out


def test_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, "pictures.py", "--out", tmp_path, "--steps", 6)
    assert {p.name for p in tmp_path.iterdir()} == {
        "input_histogram.png", "norm_cubes.png", "momentum_chase.png", "activation_map.png",
        "percentiles.png",
    }  # fmt: skip
