"""examples/batch_size.py runs: every norm trains a step or two."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "batch_size.py"


@pytest.mark.usefixtures("threads")
def test_the_example_prints_a_row_for_each_norm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["batch_size.py", "--sizes", "128", "--epochs", "1"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    rows = dict(line.split() for line in capsys.readouterr().out.splitlines()[3:])
    assert list(rows) == ["batch", "ghost", "renorm", "group", "layer", "none"]
    assert all(0 <= float(accuracy) <= 100 for accuracy in rows.values())
