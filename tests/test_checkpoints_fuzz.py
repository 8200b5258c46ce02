"""Over 5,000 damaged and hostile files: each is read or refused, nothing is run, memory is bounded.

checkpoint_fuzz.py does the reading, seeded, in one process of limited memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FAMILIES = ("cut short", "bits flipped", "bytes overwritten", "pieces moved", "spliced",
            "damaged inside", "steps at random", "wrong json", "hostile", "bombs")  # fmt: skip

if sys.platform != "linux":
    pytest.skip("the process limits its memory by what /proc says", allow_module_level=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fuzz")
    done = subprocess.run(
        [sys.executable, HERE / "checkpoint_fuzz.py", folder], capture_output=True, text=True
    )
    current = folder / "current"
    at = current.read_text() if current.exists() else "the start"
    assert done.returncode == 0, f"exit code {done.returncode} at {at}\n{done.stderr[-3000:]}"
    assert not (folder / "was_run").exists()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_read_or_refused(report: dict[str, Any], family: str) -> None:
    assert report["families"][family]["wrong"] == []


def test_there_are_5000_cases_of_which_some_can_be_read(report: dict[str, Any]) -> None:
    families = report["families"]
    assert tuple(families) == FAMILIES
    assert sum(f["cases"] for f in families.values()) >= 5000
    # Damage to weights is not seen; a fuzzer whose every file is refused would test one check.
    seen = ("bits flipped", "bytes overwritten", "damaged inside", "wrong json")
    assert all(families[name]["read"] > 0 for name in seen)
    assert families["cut short"]["read"] == 0


def test_nothing_is_run_or_written(report: dict[str, Any]) -> None:
    assert report["events"] == []


def test_memory_is_bounded(report: dict[str, Any]) -> None:
    assert report["grown"] < 300 * 2**20
