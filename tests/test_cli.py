"""The command line: exit codes, what goes to which stream, and errors that say what to try."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from normwise.cli import main
from normwise.demo import experiment
from normwise.demo.network import NORMS, NORMWISE


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``--quick`` is 20 steps, and the working directory a new one."""
    monkeypatch.setattr(experiment, "QUICK", replace(experiment.QUICK, steps=20))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "<sub-command>"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["demo", "--fast"], "unrecognized arguments: --fast"),
        (["demo", "--seed", "-1"], "the seed must be an integer >= 0; got '-1'. Try: --seed 0"),
        (["demo", "--seed", "x"], "the seed must be an integer >= 0; got 'x'. Try: --seed 0"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err


def test_help_is_0_and_lists_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "demo" in capsys.readouterr().out
    assert main(["demo", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--quick", "--seed N", "--out DIR", "--json"))


def test_python_m_normwise_is_normwise() -> None:
    command = [sys.executable, "-m", "normwise", "demo", "--seed", "no"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: normwise demo")


def test_demo_prints_the_table_and_draws_the_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["demo", "--quick"]) == 0
    out, err = capsys.readouterr()
    for word in ("none", "torch.nn", "normwise", "steps to 90 %", "to 95 %", "step time", "agree"):
        assert word in out
    assert err == ""  # no progress bar where there is no terminal
    assert "\x1b" not in out
    picture = tmp_path / "normwise-demo" / "batch-norm.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"Picture: {Path('normwise-demo') / 'batch-norm.png'}" in out


def test_demo_json_is_all_there_is_on_standard_output(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["demo", "--quick", "--json", "--seed", "3", "--out", str(tmp_path / "o")]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert result["seed"] == 3
    assert result["agreement"]["passed"] is True
    assert list(result["networks"]) == ["none", "torch.nn", "normwise"]
    assert Path(result["picture"]).is_file()


def test_demo_shows_progress_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["demo", "--quick", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "20/20 steps, time left 0:00:00" in shown


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_disagreement_is_1(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {**NORMS, NORMWISE: lambda units: nn.BatchNorm1d(units, eps=0.1)}
    monkeypatch.setattr(experiment, "NORMS", wrong)
    assert main(["demo", "--quick", *flags]) == 1
    out, err = capsys.readouterr()
    assert "must train alike, their losses within 5e-04 of each other for 20 steps; got" in err
    if flags:
        assert json.loads(out)["agreement"]["passed"] is False
    else:
        assert "DISAGREE" in out


def test_an_unusable_output_directory_is_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--quick", "--out", "file"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("normwise demo: the output directory must be one that can be written to;")
    assert "got 'file' (File exists). Try: --out with another directory." in err


@pytest.mark.parametrize("module", ["sklearn", "matplotlib"])
def test_a_missing_package_is_2(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--quick"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"cannot import {_package(module)}. Try:" in err
    assert 'pip install "normwise[demo]"' in err


def _package(module: str) -> str:
    """The name that pip knows it by."""
    return {"sklearn": "scikit-learn"}.get(module, module)


def test_an_interrupt_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "train", interrupted)
    assert main(["demo", "--quick"]) == 130
    assert capsys.readouterr().err == "normwise demo: interrupted\n"
