"""The tools on the command line: what goes to which stream, files, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import normwise as nw
from normwise import doctor
from normwise.cli import SUBCOMMANDS, bench, check, convert, main
from normwise.results import Entry
from normwise.tools.bench import NORMS, BenchReport
from normwise.tools.convert import TARGETS

NETS = """
import torch
from torch import nn

FORWARDS = 0


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = build()

    def forward(self, x):
        return self.module(x)


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield torch.randn(8, 3, 8, 8, generator=generator) + 2


def noisy():
    for _ in range(3):
        yield torch.randn(8, 3, 8, 8)


def bad_momentum():
    net = build()
    net[1].momentum = 0.99
    return net


def left():
    return nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(3), nn.Sigmoid())


def number():
    return 3


def fails():
    raise RuntimeError("no such file: weights")


def takes_one(x):
    return x
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory with a module ``nets``, which no other test has imported."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("nets", None)


def built() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())


def run(*argv: str) -> int:
    return main(list(argv))


def of_json(capsys: pytest.CaptureFixture[str]) -> Any:
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# What all share


@pytest.mark.parametrize("module", SUBCOMMANDS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_help_has_examples_and_exit_codes(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    name = module.__name__.rpartition(".")[2]
    assert run(name, "--help") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"examples:\n  normwise {name}" in out
    assert "Exit codes: 0" in out
    assert "--json" in out


def test_choices_written_out_are_those_of_the_tools() -> None:
    assert set(convert.KINDS) == set(TARGETS)
    assert set(bench.NORMS) == set(NORMS)
    assert tuple(check.SEVERITIES) == doctor.finding.SEVERITIES


MODEL = ["fold", "--input", "2x3x8x8", "--model"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["fold", "--model", "nets:build"], "the following arguments are required: --input"),
        ([*MODEL, "nets:build", "--input", "3xx8"], "an input is a shape"),
        ([*MODEL, "nets:build", "--input", "3:int7"], "got '3:int7'. Try: 1x3x224x224"),
        ([*MODEL, "nets"], "--model names a function as package.module:function; got 'nets'"),
        ([*MODEL, "nowhere:build"], "the module of --model can be imported; got ModuleNotFound"),
        ([*MODEL, "nets:biuld"], "got 'biuld', which is not there. Try: "),
        ([*MODEL, "nets:number"], "--model returns a torch.nn.Module; got builtins.int"),
        ([*MODEL, "nets:fails"], "got RuntimeError: no such file: weights"),
        ([*MODEL, "nets:takes_one"], "is called without arguments and returns; got TypeError"),
        ([*MODEL, "nets:build", "-o", "x.txt"], "the suffix of -o says what is written"),
        ([*MODEL, "nets:build", "-o", "no/x.safetensors"], "an output must be writable"),
        ([*MODEL, "nets:build", "--weights", "none.pt"], "none.pt"),
        (["fold", "--model", "nets:build", "--input", "2x4x8x8"], "normwise fold: "),
        (["recalibrate", "--model", "nets:build"], "arguments are required: --data"),
        (["recalibrate", "--model", "nets:build", "--data", "nets:batches", "--batches", "0"],
         "it must be an integer >= 1; got '0'"),
        (["recalibrate", "--model", "nets:build", "--data", "nets:batches", "--batches", "9"],
         "normwise recalibrate: "),
        (["convert", "--model", "nets:build", "--to", "cement"], "invalid choice: 'cement'"),
        (["convert", "--model", "nets:build", "--to", "group", "--option", "8"],
         "an option is NAME=VALUE; got '8'"),
        (["bench", "--shape", "8"], "a shape for batch norm has 2 to 5 axes"),
        (["bench", "--shape", "8x8", "--channels-last"], "in channels_last has 4 to 5 axes"),
        (["bench", "--shape", "1x8"], "a channel has two values or more; got 1 in 1x8"),
        (["bench", "--seconds", "0"], "it must be a number of seconds above 0; got '0'"),
        (["check"], "check takes a checkpoint or --model, and what goes with it; got neither"),
        (["check", "a.pt", "--model", "nets:build"], "got both"),
        (["check", "a.pt", "--data", "nets:batches"], "got --data with a checkpoint"),
        (["check", "a.pt", "--input", "1x3"], "got --input with a checkpoint"),
        (["check", "a.pt", "--fix"], "got --fix without -o"),
        (["check", "a.pt", "-o", "b.pt"], "got -o without --fix"),
        (["check", "a.pt", "--unsafe-fixes"], "got --unsafe-fixes without --fix"),
        (["check", "a.pt"], "a.pt"),
        (["check", "nets.py"], "nets.py"),
        (["check", "--model", "nets:build", "--select", "NW9"], "got 'NW9'"),
        (["check", "--model", "nets:build", "--per-layer", "1"], "it is PATTERN=RULES; got '1'"),
        (["check", "--model", "nets:build", "--config", "none.toml"], "none.toml"),
        (["report", "none.json", "-o", "page.html"], "none.json"),
        (["report", "nets.py", "-o", "page.html"], "normwise report: a result is JSON"),
        (["report", "nets.py"], "the following arguments are required: -o/--output"),
        (["report", "a.json", "-o", "a.json"], "the page is another file than the results"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)  # fmt: skip
def test_wrong_usage_and_unreadable_input_are_2(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in " ".join(err.split())
    assert "Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} <= {"nets.py", "__pycache__"}


def test_weights_of_another_model_are_2(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), "other.pt")
    assert run(*MODEL, "nets:build", "--weights", "other.pt") == 2
    assert "the weights are those of the model (Sequential); got 'other.pt'" in (
        capsys.readouterr().err
    )


def test_weights_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"1.weight": Bomb()}, "bomb.pt")
    assert run(*MODEL, "nets:build", "--weights", "bomb.pt") == 2
    assert run("check", "bomb.pt") == 2
    assert not (tmp_path / "exploded").exists()
    assert capsys.readouterr().out == ""


def test_weights_whose_names_begin_with_a_wrappers(capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"module.{name}": t for name, t in built().state_dict().items()}
    state["module.1.bias"] = torch.full((8,), 5.0)
    torch.save(state, "wrapped.pt")
    for model in ("nets:build", "nets:Wrapped"):  # a class is a function that returns a model
        assert run("recalibrate", "--model", model, "--weights", "wrapped.pt", "--data",
                   "nets:batches", "-o", "out.pt") == 0  # fmt: skip
        saved = torch.load("out.pt", weights_only=True)
        assert torch.equal(saved[f"{'module.' * (model == 'nets:Wrapped')}1.bias"],
                           torch.full((8,), 5.0))  # fmt: skip
    capsys.readouterr()


# fold


def test_fold_writes_what_load_folded_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*MODEL, "nets:build", "--seconds", "0", "-o", "f.safetensors", "--html", "f.html",
               "--json") == 0  # fmt: skip
    report = of_json(capsys)
    assert report["title"] == "fold"
    assert report["output"] == "f.safetensors"
    (entry,) = report["entries"]
    assert (entry["name"], entry["action"], entry["into"]) == ("1", "folded", "0")
    net, x = built().eval(), torch.randn(2, 3, 8, 8)
    folded = nw.load_folded(net, "f.safetensors")
    assert type(folded[1]) is nn.Identity
    torch.testing.assert_close(folded(x), net(x))
    assert Path("f.html").read_text().startswith("<!doctype html>")


def test_fold_prints_a_table_without_colour(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*MODEL, "nets:build", "--seconds", "0") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "1 batch norms: 1 folded" in out
    assert "\x1b" not in out


def test_fold_strict_is_1_where_a_norm_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["fold", "--model", "nets:left", "--input", "2x3x8x8", "--seconds", "0"]
    fates = {e.action for e in nw.fold(nn.Sequential(nn.BatchNorm1d(3).train()).eval(),
                                       torch.randn(2, 3), seconds=0).report}  # fmt: skip
    assert fates == {"multiply-add"}
    assert run(*model, "--strict") == 0  # a multiply-add is no norm
    (Path("nets.py")).write_text(NETS + "\n\ndef trains():\n    net = build().eval()\n"
                                 "    net[1].train()\n    return Still(net)\n\n\n"
                                 "class Still(nn.Module):\n    def __init__(self, net):\n"
                                 "        super().__init__()\n        self.net = net\n\n"
                                 "    def forward(self, x):\n        self.net[1].training = True\n"
                                 "        return self.net(x)\n")  # fmt: skip
    sys.modules.pop("nets")
    model[2] = "nets:trains"
    assert run(*model) == 0
    assert run(*model, "--strict") == 1
    capsys.readouterr()


# recalibrate


@pytest.mark.parametrize("name", ["new.pt", "new.safetensors"])
def test_recalibrate_writes_the_statistics_of_the_data(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("recalibrate", "--model", "nets:build", "--data", "nets:batches", "-o", name,
               "--json") == 0  # fmt: skip
    report = of_json(capsys)
    assert report["self_consistent"] is True
    load = safetensors.torch.load_file if name.endswith("s") else torch.load
    state = load(name)
    net = built()
    generator = torch.Generator().manual_seed(1)
    x = torch.cat([torch.randn(8, 3, 8, 8, generator=generator) + 2 for _ in range(3)])
    y = net[0](x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(state["1.running_mean"], y.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state["1.running_var"], y.var(1), rtol=1e-5, atol=1e-5)
    assert state.keys() == net.state_dict().keys()


def test_recalibrate_is_1_where_its_check_does_not_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recalibrate", "--model", "nets:build", "--data", "nets:noisy", "-o", "n.pt") == 1
    out, err = capsys.readouterr()
    assert "check DOES NOT HOLD" in out
    assert err == ""


# convert


def test_convert_keeps_what_was_learned(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "--model", "nets:build", "--to", "normwise", "--input", "2x3x8x8",
               "-o", "ours.pt", "--json") == 0  # fmt: skip
    report = of_json(capsys)
    assert [e["action"] for e in report["entries"]] == ["converted"]
    assert report["difference"] < 1e-5
    state = torch.load("ours.pt", weights_only=True)
    assert all(torch.equal(t, state[name]) for name, t in built().state_dict().items())


def test_convert_takes_options_of_the_class(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["convert", "--model", "nets:build", "--to", "group", "--option", "num_groups=4"]
    assert run(*argv, "--input", "2x3x8x8", "-o", "group.pt") == 0
    assert "GroupNorm" in capsys.readouterr().out
    again = nw.convert(built(), "group", num_groups=4).model
    again.load_state_dict(torch.load("group.pt", weights_only=True))
    assert again[1].num_groups == 4


def test_convert_is_1_where_outputs_moved_that_should_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from normwise.tools.convert import main as tool

    monkeypatch.setattr(tool, "distance", lambda *_: float("nan"))
    argv = ["convert", "--model", "nets:build", "--to", "normwise", "--input", "2x3x8x8"]
    assert run(*argv) == 1
    capsys.readouterr()


# check


def checkpoint(path: str, **changes: torch.Tensor) -> None:
    """As trained for a while, but for ``changes`` of the norm."""
    torch.manual_seed(0)
    net = built()
    for _ in range(100):
        net(torch.randn(8, 3, 8, 8))
    state = net.state_dict()
    state["1.weight"] = torch.rand(8) + 0.5
    state.update({f"1.{name}": t for name, t in changes.items()})
    if path.endswith(".safetensors"):
        safetensors.torch.save_file({k: t.contiguous() for k, t in state.items()}, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("path", ["good.safetensors", "good.pt"])
def test_check_of_a_sound_checkpoint_is_0(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(path)
    assert run("check", path) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"1 norm of {path}: no findings")
    assert err == ""


def test_check_of_a_damaged_checkpoint_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint("bad.pt", running_var=torch.tensor([1.0, -1, 1, 1, 1, 1, 1, 1]))
    assert run("check", "bad.pt") == 1
    out = capsys.readouterr().out
    assert out.startswith("1: NW102 negative-variance (error): ")
    assert "\x1b" not in out
    assert run("check", "bad.pt", "--json", "--html", "check.html") == 1
    report = of_json(capsys)
    assert [f["code"] for f in report["findings"]] == ["NW102"]
    assert "negative-variance" in Path("check.html").read_text()


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--ignore", "NW102"], 0),
        (["--ignore", "NW105,negative-variance"], 0),
        (["--select", "NW101"], 0),
        (["--select", "NW101", "--select", "NW102"], 1),
        (["--per-layer", "1=NW102"], 0),
        (["--per-layer", "other.*=NW102"], 1),
        (["--config", "some.toml"], 0),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_check_runs_the_rules_that_are_chosen(
    flags: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("some.toml").write_text('[tool.normwise.check]\nignore = ["NW102"]\n')
    checkpoint("bad.pt", running_var=torch.tensor([1.0, -1, 1, 1, 1, 1, 1, 1]))
    assert run("check", "bad.pt", *flags) == code
    capsys.readouterr()


def test_check_fails_on_the_severity_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    Path("nets.py").write_text(NETS + "\n\ndef biased():\n    net = build()\n"
                               "    net[0] = nn.Conv2d(3, 8, 3)\n    return net\n")  # fmt: skip
    argv = ["check", "--model", "nets:biased", "--input", "2x3x8x8", "--select", "NW201"]
    assert run(*argv) == 0
    assert "(info)" in capsys.readouterr().out
    assert run(*argv, "--fail-on", "info") == 1
    capsys.readouterr()


def test_check_with_data_runs_the_rules_on_data(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint("old.pt")  # of other data
    argv = ["check", "--model", "nets:build", "--weights", "old.pt", "--data", "nets:batches"]
    assert run(*argv, "--json") == 1
    codes = {f["code"] for f in of_json(capsys)["findings"]}
    assert "NW301" in codes


def test_check_fixes_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint("old.pt")  # of other data
    argv = ["check", "--model", "nets:build", "--data", "nets:batches", "--select", "NW301"]
    old = ["--weights", "old.pt"]
    assert run(*argv, *old) == 1
    assert "[--fix --unsafe-fixes, with --model and --data]" in capsys.readouterr().out
    assert run(*argv, *old, "--fix", "-o", "safe.pt") == 1  # the fix is not a safe one
    assert "[left: the fix is unsafe" in capsys.readouterr().out
    assert run(*argv, *old, "--fix", "--unsafe-fixes", "-o", "fixed.pt", "--json") == 0
    repair = of_json(capsys)["repair"]
    assert [e["action"] for e in repair["entries"]] == ["fixed"]
    assert run(*argv, "--weights", "fixed.pt") == 0
    assert run(*argv, "--weights", "safe.pt") == 1
    capsys.readouterr()


def test_check_fixes_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.full((8,), 1.0)
    variance = torch.full((8,), 1.0)
    weight[2], variance[2] = 1.0, 0.0
    checkpoint("dead.safetensors", weight=weight, running_var=variance)
    assert run("check", "dead.safetensors", "--select", "NW105") == 1
    argv = ["check", "dead.safetensors", "--select", "NW105", "--fix", "--unsafe-fixes"]
    assert run(*argv, "-o", "fixed.safetensors") == 0
    assert "fixed: " in capsys.readouterr().out
    assert run("check", "fixed.safetensors", "--select", "NW105") == 0
    before = safetensors.torch.load_file("dead.safetensors")
    after = safetensors.torch.load_file("fixed.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["1.weight"]
    capsys.readouterr()


def test_check_lists_its_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "--rules", "--json") == 0
    rules = of_json(capsys)
    assert [r["code"] for r in rules] == [r.code for r in doctor.all_rules()]
    assert run("check", "--rules") == 0
    assert "NW101  non-finite-buffer" in capsys.readouterr().out


def test_explain_shows_the_page_of_a_rule(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("NW101", "nw101", "non-finite-buffer"):
        assert run("explain", word) == 0
        assert "NW101 non-finite-buffer" in capsys.readouterr().out
    assert run("explain", "NW101", "--json") == 0
    assert of_json(capsys)["id"] == "NW101"


# bench


def test_bench_measures_both_and_sees_that_they_agree(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert run("bench", "--shape", "4x3x5x5", "--shape", "16x3", "--seconds", "0.01", "--threads",
               "1", "--json", "--html", "b.html") == 0  # fmt: skip
    report = of_json(capsys)
    assert torch.get_num_threads() == threads
    assert [(e["name"], e["action"]) for e in report["entries"]] == [
        (shape, name)
        for shape in ("4x3x5x5", "16x3")
        for name in ("forward", "forward and backward", "eval")
    ]
    for entry in report["entries"]:
        assert entry["torch_ms"] > 0 < entry["normwise_ms"]
        assert entry["rounds"] >= 5
        assert entry["error"] <= report["tolerance"]
    assert report["threads"] == 1


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_bench_takes_every_norm(norm: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "--norm", norm, "--seconds", "0.001"]
    assert run(*argv, "--shape", "4x6x5x5", "--channels-last", "--dtype", "bfloat16") == 0
    assert run(*argv, "--shape", "4x6x8") == 0
    assert f"{norm} norm, float32, contiguous" in capsys.readouterr().out


def test_bench_is_1_where_the_two_disagree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = (
        lambda library, shape, dtype: nn.BatchNorm1d(shape[1], eps=1.0 if library is nn else 1e-5),
        2,
    )
    monkeypatch.setitem(NORMS, "batch", wrong)
    assert run("bench", "--shape", "16x3", "--seconds", "0.001") == 1
    assert "THE TWO DISAGREE" in capsys.readouterr().out


def test_a_difference_that_is_no_number_is_one() -> None:
    entry = Entry("2x2", "eval", facts={"error": float("nan"), "ratio": 1.0})
    assert not BenchReport([entry], {"tolerance": 1.0}).passed


# report


def test_report_makes_one_page_of_several_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*MODEL, "nets:build", "--seconds", "0", "--json") == 0
    Path("fold.json").write_text(capsys.readouterr().out)
    assert run("bench", "--shape", "16x3", "--seconds", "0.001", "--json") == 0
    Path("bench.json").write_text(capsys.readouterr().out)
    checkpoint("bad.pt", running_var=torch.tensor([1.0, -1, 1, 1, 1, 1, 1, 1]))
    assert run("check", "bad.pt", "--json") == 1
    Path("check.json").write_text(capsys.readouterr().out)
    files = ["fold.json", "bench.json", "check.json"]
    assert run("report", *files, "-o", "page.html", "--title", "My <net>") == 0
    assert capsys.readouterr().out == "page.html\n"
    page = Path("page.html").read_text()
    assert "My &lt;net&gt;" in page
    assert "negative-variance" in page
    assert run("report", *files, "-o", "page.html", "--json") == 0
    assert of_json(capsys) == {"output": "page.html", "results": 3}


# Around


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--print-completion", shell) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in ("recalibrate", "--unsafe-fixes", "--channels-last"):
        assert word.lstrip("-") in out


def test_the_bash_script_completes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("--print-completion", "bash") == 0
    script = capsys.readouterr().out + (
        'COMP_WORDS=(normwise recal); COMP_CWORD=1\n_shtab_normwise\necho "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["recalibrate"]


def test_completion_without_shtab_is_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run("--print-completion", "bash") == 2
    err = capsys.readouterr().err
    assert err.startswith("normwise: completion scripts are written by shtab; got ")
    assert 'pip install "normwise[cli]"' in err


@pytest.mark.parametrize("colour", [False, True])
def test_colour_is_for_terminals(
    colour: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # a log file is none, whatever this says
    checkpoint("bad.pt", running_var=torch.tensor([1.0, -1, 1, 1, 1, 1, 1, 1]))
    if colour:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("check", "bad.pt") == 1
    assert ("\x1b[" in capsys.readouterr().out) is colour
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("NO_COLOR", "1")
    assert run("check", "bad.pt") == 1
    assert "\x1b[31m" not in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m normwise explain momentum | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"
