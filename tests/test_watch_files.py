"""What ``watch`` writes and reports: lines, Parquet, TensorBoard, the record and its thinning."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import normwise as nw
from normwise.errors import InputError, OutputError
from normwise.tools.watch import WatchRecord
from normwise.tools.watch import main as watch_main
from normwise.tools.watch.call import columns
from normwise.tools.watch.files import JsonLines


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    """Thousands of tiny operations: a second thread only waits for its core."""
    torch.set_num_threads(1)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.LayerNorm(6))


def train(net: nn.Module, steps: int, last: int = 4) -> None:
    """The last batch may have a size that the model does not take."""
    for size in [4] * (steps - 1) + [last]:
        net(torch.randn(8, size)).square().mean().backward()


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Files


def test_lines_are_there_while_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "watch.jsonl"
    net = model()
    with nw.watch(net, every=1, path=path):
        train(net, 3)
        # The last step waits for its gradients.
        assert [row["step"] for row in lines(path)] == [0, 0, 1, 1]
    assert [row["step"] for row in lines(path)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".parquet"])
def test_a_file_reads_back_as_the_record(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"watch{suffix}"
    net = model()
    with nw.watch(net, every=2, path=path, percentiles=(2.5, 50)) as record:
        train(net, 5)
    read = WatchRecord.load(path)
    assert read.data() == record.data()
    assert (read.steps, read.every, read.percentiles) == (5, 2, (2.5, 50))
    assert [e.facts for e in read] == [e.facts for e in record]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_run_that_goes_on_appends(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".parquet"):
        path = tmp_path / f"watch{suffix}"
        net = model()
        for start in (0, 2):
            with nw.watch(net, every=1, path=path, start=start):
                train(net, 2)
        assert WatchRecord.load(path).series("1")[0] == [0, 1, 2, 3]


def test_columns_of_a_parquet_file_have_types(tmp_path: Path) -> None:
    net = model()
    with nw.watch(net, every=1, path=tmp_path / "w.parquet"):
        train(net, 1)
    schema = parquet.read_schema(tmp_path / "w.parquet")
    assert tuple(schema.names) == columns((1, 15, 50, 85, 99))
    kinds = {name: str(schema.field(name).type) for name in ("step", "name", "training", "shift")}
    assert kinds == {"step": "int64", "name": "string", "training": "bool", "shift": "double"}


KILLED = """
import os, signal, sys, torch
import normwise as nw
net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6))
with nw.watch(net, every=1, path=sys.argv[1]):
    for _ in range(4):
        net(torch.randn(8, 4)).square().mean().backward()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_lines_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "w.parquet"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert WatchRecord.load(f"{path}.jsonl").series("1")[0] == [0, 1, 2]
    net = model()
    with nw.watch(net, every=1, path=path, start=3, layers="1"):
        train(net, 1)
    assert WatchRecord.load(path).series("1")[0] == [0, 1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_line_that_was_cut_off_is_ended_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    net = model()
    with nw.watch(net, every=1, path=path, layers="1"):
        train(net, 2)
    path.write_bytes(path.read_bytes()[:-20])
    with nw.watch(net, every=1, path=path, layers="1", start=1):
        train(net, 2)
    assert WatchRecord.load(path).series("1")[0] == [0, 1, 2]


def test_an_exception_leaves_what_was_measured(tmp_path: Path) -> None:
    net = model()
    for suffix in (".jsonl", ".parquet"):
        path = tmp_path / f"w{suffix}"
        with pytest.raises(RuntimeError), nw.watch(net, every=1, path=path):
            train(net, 3, last=5)
        assert WatchRecord.load(path).series("1")[0] == [0, 1]


def test_a_path_that_cannot_be_written_to(tmp_path: Path) -> None:
    net = model()
    with pytest.raises(OutputError), nw.watch(net, path=tmp_path / "none" / "w.jsonl"):
        pass
    assert not net._forward_hooks


def test_a_write_that_fails_warns_once_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, rows: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JsonLines, "write", full)
    net = model()
    with (
        pytest.warns(UserWarning, match="gets no more rows") as warned,
        nw.watch(net, every=1, path=tmp_path / "w.jsonl") as record,
    ):
        train(net, 4)
    assert len(warned) == 1
    assert record.series("1")[0] == [0, 1, 2, 3]


def test_ranks_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = watch_main.torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    net, board = model(), Board()
    with nw.watch(net, every=1, path=tmp_path / "w.jsonl", tensorboard=board):
        train(net, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["w.rank1.jsonl"]
    assert board.scalars == {}


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"step": 1, "mode": "train"}\n')
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "a.csv").write_text("step\n1\n")
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        with pytest.raises(InputError):
            WatchRecord.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        WatchRecord.load(tmp_path / "none.jsonl")


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    net = model()
    with nw.watch(net, every=1, path=tmp_path / "w.jsonl"):
        net(torch.full((8, 4), torch.inf)).mean().backward()
    (first, _) = lines(tmp_path / "w.jsonl")
    assert first["gamma_grad"] is None
    assert first["nonfinite"] == 48
    assert first["nonfinite_grads"] == 3


# TensorBoard


class Board:
    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value


def test_anything_with_add_scalar_gets_the_figures() -> None:
    net, board = model(), Board()
    with nw.watch(net, every=2, tensorboard=board) as record:
        train(net, 3)
        net.eval()(torch.randn(8, 4))
    steps, medians, shifts = record.series("1", "input_p50", "shift")
    assert [board.scalars["watch/1/input_p50", s] for s in steps] == medians
    assert [board.scalars["watch/1/shift", s] for s in steps] == shifts
    assert ("watch_eval/2/output_p99", 3) in board.scalars
    assert {tag for tag, _ in board.scalars if "/2/shift" in tag or "/step" in tag} == set()


def test_a_directory_gets_a_log_that_tensorboard_reads(tmp_path: Path) -> None:
    net = model()
    with nw.watch(net, every=1, tensorboard=tmp_path) as record:
        train(net, 2)
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    found = log.Scalars("watch/1/gamma_grad")
    assert [e.step for e in found] == [0, 1]
    assert [e.value for e in found] == pytest.approx(record.series("1", "gamma_grad")[1])


# The record


def test_the_report(tmp_path: Path) -> None:
    net = nn.Sequential(*model(), nn.ModuleList([nn.BatchNorm1d(2)]))
    net[3].forward = lambda x: x  # type: ignore[method-assign,assignment]
    with nw.watch(net, every=1) as record:
        assert "no call of 3 norms" in str(record)
        train(net, 2)
    assert [(e.name, e.action, e.reason) for e in record] == [
        ("1", "watched", None), ("2", "watched", None), ("3.0", "left", "never-called"),
    ]  # fmt: skip
    assert "2 watched, 1 left: 4 rows of 2 training steps" in str(record)
    assert record["1"].facts["kind"] == "BatchNorm1d"
    assert record["1"].facts["shift"] == record.rows[-2]["shift"]
    found = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    assert found["rows"]["step"] == [0, 0, 1, 1]
    assert found["steps"] == 2
    record.save_html(tmp_path / "watch.html")
    assert "never-called" in (tmp_path / "watch.html").read_text()


def test_a_long_run_is_thinned_evenly(tmp_path: Path) -> None:
    net = model()
    with nw.watch(net, every=1, keep=8, path=tmp_path / "w.jsonl") as record:
        train(net, 70)
    steps = record.series("1")[0]
    assert steps == list(range(0, 70, 16))
    assert record["1"].facts["rows"] == 70
    assert len(lines(tmp_path / "w.jsonl")) == 140


def test_the_cost_is_in_the_report() -> None:
    net = model()
    with nw.watch(net, every=1) as record:
        train(net, 2)
    assert 0 < record.facts["seconds"] < 60


def test_files_do_not_stay_open(tmp_path: Path) -> None:
    net = model()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with nw.watch(net, every=1, path=tmp_path / "w.jsonl"):
        train(net, 1)
    after = len(os.listdir("/proc/self/fd")) if before else 0
    assert after == before
