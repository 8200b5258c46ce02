"""The benchmark harness's own logic: what it counts, in which order, and what it writes.

No test looks at how long anything took.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import (
    cases,
    contenders,
    floor,
    machine,
    passes,
    regimes,
    steps,
    tables,
    timing,
    worker,
)
from benchmarks.__main__ import main
from benchmarks.cases import Case
from benchmarks.rows import Row, make_row
from benchmarks.timing import Plan, Quartiles, Samples

# --- cases


def test_resnet50_has_its_53_batch_norms() -> None:
    shapes = cases.resnet50_shapes()
    # Counted by hand from table 1 of He et al. (2016), stride in the 3×3 convolution.
    assert shapes == {
        (32, 64, 112, 112): 1,
        (32, 64, 56, 56): 6,
        (32, 256, 56, 56): 4,
        (32, 128, 56, 56): 1,
        (32, 128, 28, 28): 7,
        (32, 512, 28, 28): 5,
        (32, 256, 28, 28): 1,
        (32, 256, 14, 14): 11,
        (32, 1024, 14, 14): 7,
        (32, 512, 14, 14): 1,
        (32, 512, 7, 7): 5,
        (32, 2048, 7, 7): 4,
    }
    assert shapes.total() == 53


def test_full_selection_is_the_cross_product_without_duplicates() -> None:
    full = cases.select(cases.FULL)
    names = [case.name for case in full]
    assert len(set(names)) == len(names)
    resnet = [case for case in full if case.suite == "resnet50"]
    assert len(resnet) == 12 * 2 * 4 * 3 * 3  # shapes, layouts, dtypes, phases, fused
    assert {case.layout for case in full if len(case.shape) < 4} == {"contiguous"}


def test_smaller_selections_are_parts_of_the_full_one() -> None:
    full, default, quick = (set(cases.select(s)) for s in ("full", "default", "quick"))
    assert quick < default < full
    for axis in ("suite", "dtype", "phase", "layout", "fused"):
        in_full = {getattr(case, axis) for case in full}
        assert {getattr(case, axis) for case in default} == in_full, axis


def test_default_selection_has_every_float32_layer_in_both_layouts() -> None:
    layers = Counter[tuple[str, str, str]]()
    for case in cases.select(suite="resnet50", dtype="float32"):
        layers[case.layout, case.phase, case.fused] += case.layers
    for key in itertools.product(cases.LAYOUTS, cases.PHASES, ("none", "add+relu")):
        assert layers[key] == 53, key


def test_select_narrows_on_every_axis() -> None:
    chosen = cases.select(
        cases.FULL,
        suite="tiny",
        text="8x16x8x8",
        phase="backward",
        layout="channels_last",
        dtype="bfloat16",
    )
    assert [case.fused for case in chosen] == list(cases.FUSED)
    assert {dataclasses.replace(case, fused="none") for case in chosen} == {
        Case("tiny", (8, 16, 8, 8), "channels_last", "bfloat16", "backward")
    }


def test_compile_takes_part_in_few_cases_by_default_and_in_all_of_the_full_run() -> None:
    default, full = cases.select(cases.DEFAULT), cases.select(cases.FULL)
    taking_part = [case for case in default if cases.compiled(case, cases.DEFAULT)]
    assert {case.phase for case in taking_part} == set(cases.PHASES)
    assert 0 < len(taking_part) < len(default) / 8
    assert all(cases.compiled(case, cases.FULL) for case in full)


def test_case_survives_a_round_trip_and_knows_its_size() -> None:
    case = Case("ranks", (4, 8, 10), dtype="bfloat16", layers=3)
    assert Case.from_dict(case.to_dict()) == case
    assert case.nbytes == 4 * 8 * 10 * 2
    assert case.channels == 8


# --- floor


@pytest.mark.parametrize(
    ("phase", "fused", "nchw", "nhwc"),
    [
        ("forward", "none", 2, 3),
        ("forward", "relu", 2, 3),
        ("forward", "add+relu", 3, 4),
        ("backward", "none", 3, 5),
        ("backward", "relu", 3, 5),
        ("backward", "add+relu", 5, 7),
        ("eval", "none", 2, 2),
        ("eval", "relu", 2, 2),
        ("eval", "add+relu", 3, 3),
    ],
)
def test_floor_counts_the_tensors_that_must_move(
    phase: str, fused: str, nchw: int, nhwc: int
) -> None:
    case = Case("ranks", (2, 3, 4, 5), phase=phase, fused=fused)
    assert floor.units(case) == nchw
    assert floor.units(dataclasses.replace(case, layout="channels_last")) == nhwc
    # (N, C) is NHWC without space: neighbours belong to different channels.
    assert floor.units(dataclasses.replace(case, shape=(2, 3))) == nhwc
    assert floor.units(dataclasses.replace(case, shape=(2, 3, 4))) == nchw


def test_floor_time_and_bandwidth_follow_from_the_copy() -> None:
    case = Case("ranks", (10, 100, 250), phase="backward")  # 1 MB
    assert floor.floor_seconds(case, 1e-3) == pytest.approx(1.5e-3)  # 3 units, a copy is 2
    assert floor.copy_bandwidth(case, 1e-3) == pytest.approx(2e9)


# --- timing


class FakeTime:
    """A clock that only calls move, and the log of who was called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def call(self, name: str, *seconds: float) -> timing.Call:
        durations = itertools.cycle(seconds)

        def run() -> None:
            self.now += next(durations)
            self.log.append(name)

        return run

    def measure(self, calls: dict[str, timing.Call], plan: Plan) -> dict[str, Samples]:
        return timing.measure(calls, plan, clock=lambda: self.now, faults=lambda: len(self.log))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_each_contender_follows_each_other_one_equally_often(n: int) -> None:
    orders = timing.balanced_orders(n)
    assert all(sorted(order) == list(range(n)) for order in orders)
    followers = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(followers) == set(itertools.permutations(range(n), 2))
    assert len(set(followers.values())) <= 1
    positions = Counter((place, who) for order in orders for place, who in enumerate(order))
    assert len(set(positions.values())) == 1


def test_short_calls_are_put_in_a_loop_and_long_ones_are_not() -> None:
    time = FakeTime()
    calls = {"short": time.call("short", 1e-6), "long": time.call("long", 0.1)}
    samples = time.measure(calls, Plan(sample=1e-3, least_rounds=2, budget=0.0))
    assert samples["short"].inner == pytest.approx(1000, abs=1)
    assert samples["long"].inner == 1
    assert samples["short"].seconds == pytest.approx([1e-6] * 2)
    assert samples["long"].seconds == pytest.approx([0.1] * 2)
    assert samples["short"].page_faults == [1.0, 1.0]  # the fake has one a call


def test_every_round_has_a_turn_of_each() -> None:
    time = FakeTime()
    calls = {name: time.call(name, 1.0) for name in "abc"}
    time.measure(calls, Plan(least_rounds=6, budget=0.0, warmup=0.0))
    turns = time.log[3:]  # one call each to warm up
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert len(rounds) == 6
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(map(tuple, rounds))) == 6


def test_rounds_go_on_while_the_medians_are_unsettled() -> None:
    def rounds(*seconds: float) -> int:
        time = FakeTime()
        calls = {"steady": time.call("steady", 1.0), "other": time.call("other", *seconds)}
        plan = Plan(least_rounds=4, budget=10.0, patience=100.0, most_rounds=500)
        return len(time.measure(calls, plan)["other"].seconds)

    assert rounds(1.0) == 5  # the budget: 10 seconds at 2 a round
    assert rounds(1.0, 2.0, 3.0) > 25  # the patience, at about 3 seconds a round


def test_what_slows_a_whole_round_does_not_unsettle() -> None:
    alike = [Samples(1, [1.0, 2.0, 9.0, 1.0]), Samples(1, [2.0, 4.0, 18.0, 2.0])]
    assert timing.unsettled(alike) == pytest.approx(0.0)
    unlike = [Samples(1, [1.0, 2.0, 9.0, 1.0]), Samples(1, [2.0, 2.0, 2.0, 2.0])]
    assert timing.unsettled(unlike) > 0.1


def test_garbage_collection_is_off_while_measuring_and_on_again_after_an_error() -> None:
    import gc

    seen: list[bool] = []

    def fails_in_the_third_round() -> None:
        seen.append(gc.isenabled())
        if len(seen) > 3:
            raise RuntimeError("third")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="third"):
        timing.measure({"a": fails_in_the_third_round}, Plan(sample=0.0, warmup=0.0))
    assert seen == [True, False, False, False]
    assert gc.isenabled()


def test_quartiles_and_paired_ratios() -> None:
    assert timing.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == Quartiles(2.0, 3.0, 4.0)
    assert timing.quartiles([7.0]) == Quartiles(7.0, 7.0, 7.0)
    # A disturbed round (the last) disturbs both sides: the ratio does not notice.
    assert timing.paired_ratio([2.0, 4.0, 90.0], [1.0, 2.0, 45.0]) == Quartiles(2.0, 2.0, 2.0)


# --- contenders


@pytest.mark.parametrize("fused", cases.FUSED)
@pytest.mark.parametrize("phase", cases.PHASES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_torch_contender_does_the_work_of_the_formula(layout: str, phase: str, fused: str) -> None:
    """Against the formula in float64, differentiated by autograd."""
    case = Case("tiny", (6, 5, 3, 4), layout, "float64", phase, fused)
    data = contenders.make_data(case)
    with torch.set_grad_enabled(phase != "eval"):
        got = contenders.build(contenders.TORCH, case, data)()
    weight, bias, mean, var = (
        data.state[key].view(1, -1, 1, 1)
        for key in ("weight", "bias", "running_mean", "running_var")
    )
    leaves = [data.x, weight.requires_grad_(), bias.requires_grad_()]
    if phase != "eval":
        mean, var = data.x.mean((0, 2, 3), True), data.x.var((0, 2, 3), False, True)
    y = (data.x - mean) / torch.sqrt(var + 1e-5) * weight + bias
    if data.residual is not None:
        y = y + data.residual
        leaves.insert(1, data.residual)
    y = y if fused == "none" else y.clamp(min=0)
    if phase == "backward":
        expected = torch.autograd.grad(y, leaves, data.cotangent)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b.reshape(a.shape))
    else:
        torch.testing.assert_close(got, y)


@pytest.mark.parametrize(
    "case",
    [case for case in cases.select(cases.FULL, suite="tiny") if case.phase == "forward"],
    ids=lambda case: case.name,
)
def test_data_have_the_shape_dtype_and_layout_of_the_case(case: Case) -> None:
    data = contenders.make_data(case)
    assert data.x.dtype == getattr(torch, case.dtype)
    assert (data.residual is not None) == (case.fused == "add+relu")
    half = case.dtype in ("float16", "bfloat16")
    assert data.state["weight"].dtype == (torch.float32 if half else data.x.dtype)
    for tensor in (*data.operands, data.cotangent):
        assert tensor.shape == case.shape
        assert (tensor.stride(1) == 1) == case.channel_is_innermost
    assert data.cotangent.unique().numel() > 50  # not ones: their gradient is zero


def test_copy_fills_a_tensor_that_exists_already() -> None:
    case = Case("tiny", (2, 3, 4, 5), "channels_last")
    data = contenders.make_data(case)
    call = contenders.build(contenders.COPY, case, data)
    first, second = call(), call()
    assert first.data_ptr() == second.data_ptr() != data.x.data_ptr()
    assert first.stride() == data.x.stride()
    torch.testing.assert_close(first, data.x.detach())


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_a_contender_that_does_other_work_is_found_out(dtype: str) -> None:
    case = Case("tiny", (8, 4), dtype=dtype)
    x = contenders.make_data(case).x
    assert contenders.disagreement(case, x, x * (1 + 1e-6)) == ""
    assert "differs" in contenders.disagreement(case, x, x * 1.2)
    assert "differs" in contenders.disagreement(case, x, x.to(torch.complex64))
    assert "differs" in contenders.disagreement(case, x * float("nan"), x)
    assert "differs" in contenders.disagreement(case, x[:4], x)
    assert "differs" in contenders.disagreement(case, (x, x), (x, x * 2))


# --- worker


_FAST = Plan(sample=0.0, budget=0.0, patience=0.0, least_rounds=2, warmup=0.0)


def test_a_case_gives_a_row_for_each_contender() -> None:
    case = Case("tiny", (8, 4), phase="backward", fused="add+relu")
    names = [contenders.TORCH, contenders.AGAIN]
    rows = {row.contender: row for row in worker.measure_case("user", case, names, _FAST)}
    assert list(rows) == [contenders.COPY, *names]
    torch_nn = rows[contenders.TORCH]
    assert (torch_nn.error, torch_nn.rounds, torch_nn.floor_units) == ("", 2, 7)
    assert torch_nn.speedup == 1.0
    assert math.isnan(rows[contenders.COPY].speedup)
    assert all(row.median_us > 0 for row in rows.values())


def test_a_contender_that_fails_is_a_row_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(case: Case, data: contenders.Data) -> torch.nn.Module:
        raise RuntimeError("no working C++ compiler\nlong story")

    monkeypatch.setitem(contenders._BLOCKS, contenders.COMPILE, no_compiler)
    names = [contenders.TORCH, contenders.COMPILE]
    rows = worker.measure_case("user", Case("tiny", (8, 4)), names, _FAST)
    assert [row.error for row in rows] == ["", "", "RuntimeError: no working C++ compiler"]
    assert math.isnan(rows[-1].median_us)


def test_a_contender_with_other_results_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders._BLOCKS, contenders.AGAIN, lambda case, data: torch.nn.ReLU())
    names = [contenders.TORCH, contenders.AGAIN]
    rows = worker.measure_case("user", Case("tiny", (8, 4)), names, _FAST)
    assert "differs from torch.nn" in rows[-1].error


# --- rows and tables


def _samples(*seconds: float, faults: float = 0.0) -> Samples:
    return Samples(1, list(seconds), [faults] * len(seconds))


def test_row_forms_ratios_within_rounds() -> None:
    case = Case("ranks", (10, 100, 250))  # 1 MB, forward: 2 units, like the copy
    own, copy = _samples(2e-3, 4e-3, 20e-3, faults=3.0), _samples(1e-3, 2e-3, 10e-3)
    row = make_row("user", case, "normwise", own, copy, _samples(6e-3, 12e-3, 60e-3))
    assert row.median_us == pytest.approx(4000)
    assert (row.speedup_q1, row.speedup, row.speedup_q3) == pytest.approx((3, 3, 3))
    assert row.share_of_floor == pytest.approx(0.5)
    assert row.floor_us == pytest.approx(2000)
    assert row.copy_gb_s == pytest.approx(1.0)
    assert row.page_faults == 3.0
    assert Row.from_dict(row.to_dict()) == row


def _rows(shape: tuple[int, ...], speedup: float, layers: int = 1, **figures: float) -> list[Row]:
    case = Case("resnet50", shape, layers=layers)
    torch_us = 100.0
    own = {"median_us": torch_us / speedup, "speedup": speedup, "share_of_floor": 0.8, **figures}
    return [
        Row("user", case, "copy", median_us=10.0, copy_gb_s=20.0),
        Row("user", case, "torch.nn", median_us=torch_us, speedup=1.0, share_of_floor=0.25),
        Row("user", case, "torch.compile", error="RuntimeError: a | b"),
        Row("user", case, "normwise", **own),
    ]


_FACTS = {"date": "today", "cpu": "a cpu"}
_LARGE, _MEDIUM, _SMALL = (32, 64, 112, 112), (32, 2048, 7, 7), (32, 512, 7, 7)


def test_markdown_says_which_figures_are_not_to_be_trusted() -> None:
    quiet, disturbed = _rows(_LARGE, 0.5, other_load=0.0), _rows(_SMALL, 0.4, other_load=0.5)
    text = tables.to_markdown([*quiet, *disturbed], _FACTS, "normwise")
    assert "During 1 of 2 cases other programs used more than 0.15 cores, or calls met" in text
    assert "excludes; those figures are not to be trusted." in text
    trusted = tables.to_markdown(quiet, _FACTS, "normwise")
    assert "During 0 of 1 cases" in trusted
    assert "regime excludes.\n" in trusted
    marked = [line for line in text.splitlines() if line.endswith("disturbed by other programs")]
    assert len(marked) == 1
    assert "32x512x7x7" in marked[0]


def test_markdown_has_means_worst_case_and_share_of_floor() -> None:
    rows = [*_rows(_LARGE, 8.0), *_rows(_MEDIUM, 2.0, layers=4), *_rows(_SMALL, 0.5, layers=5)]
    text = tables.to_markdown(rows, _FACTS, "normwise")
    line = next(line for line in text.splitlines() if line.startswith("| resnet50"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # 10 × 100 µs by torch.nn against 12.5 + 4 × 50 + 5 × 200
    assert cells == [
        "resnet50, contiguous, float32, forward",
        "3",
        "2.00",  # cube root of 8
        "4.00",  # root of 16
        f"{1000 / 1212.5:.2f}",
        "0.50 at 32×512×7×7",
        "",
        "80% (80%)",
        "25% (25%)",
    ]
    assert "torch.compile has no figures in 3 cases: RuntimeError: a \\| b" in text
    assert "a cpu" in text


def test_worst_offenders_are_listed_worst_first() -> None:
    rows = [*_rows(_LARGE, 0.89), *_rows(_MEDIUM, 0.91), *_rows(_SMALL, 0.5)]
    slow = tables.worst_offenders(rows, "normwise")
    assert [row.speedup for row in slow] == [0.5, 0.89]
    text = tables.to_markdown(rows, _FACTS, "normwise")
    assert text.index("0.50 of torch.nn's speed") < text.index("0.89 of torch.nn's speed")
    fast = tables.to_markdown(_rows(_LARGE, 3.0), _FACTS, "normwise")
    assert fast.rstrip().endswith("None.")


def test_a_contender_without_figures_leaves_a_readable_table() -> None:
    rows = [row for row in _rows(_LARGE, 2.0) if row.contender != "normwise"]
    rows.append(Row("user", rows[0].case, "normwise", error="ModuleNotFoundError: no"))
    text = tables.to_markdown(rows, _FACTS, "normwise")
    assert "No case with figures for both." in text
    assert "normwise has no figures in 1 cases: ModuleNotFoundError: no" in text


def test_csv_has_every_row_and_every_figure() -> None:
    rows = _rows(_LARGE, 2.0, page_faults=1.5)
    read = list(csv.DictReader(tables.to_csv(rows, _FACTS).splitlines()))
    assert [line["contender"] for line in read] == [row.contender for row in rows]
    ours = read[-1]
    assert (ours["shape"], ours["speedup"], ours["page_faults"]) == ("32x64x112x112", "2", "1.5")
    assert (ours["cpu"], ours["regime"], ours["megabytes"]) == ("a cpu", "user", "102.76")
    assert read[2]["median_us"] == ""
    assert read[2]["error"] == "RuntimeError: a | b"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "table.md"
    tables.write_atomically(path, "old × ratio\n")
    assert path.read_text(encoding="utf-8") == "old × ratio\n"

    def full(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        tables.write_atomically(path, "new\n")
    assert [entry.name for entry in path.parent.iterdir()] == ["table.md"]
    assert path.read_text(encoding="utf-8") == "old × ratio\n"


def test_the_machine_is_described() -> None:
    facts = machine.describe(threads=2)
    assert facts["threads"] == "2"
    assert facts["python"] == platform.python_version()
    assert all(facts.values())


def test_other_load_is_what_others_used_and_not_what_we_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(busy: tuple[float, float], own: tuple[float, float]) -> float:
        clocks = {"_busy_seconds": busy, "_own_seconds": own, "perf_counter": (10.0, 14.0)}
        for name, readings in clocks.items():
            monkeypatch.setattr(machine, name, iter(readings).__next__)
        with machine.other_load() as meter:
            pass
        return meter.cores

    assert load(busy=(100.0, 110.0), own=(1.0, 5.0)) == pytest.approx(1.5)  # 10 s less our 4, of 4
    assert load(busy=(100.0, 103.99), own=(1.0, 5.0)) == 0.0  # clock ticks are coarse
    assert math.isnan(load(busy=(math.nan, math.nan), own=(1.0, 5.0)))


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells")
def test_time_of_all_processors_contains_our_own() -> None:
    busy, own = machine._busy_seconds(), machine._own_seconds()
    while machine._own_seconds() < own + 0.1:
        pass
    assert machine._busy_seconds() - busy >= 0.05


# --- passes


def _reading(load: float, figure: float, shape: tuple[int, ...] = (8, 4)) -> list[Row]:
    return [Row("user", Case("tiny", shape), "normwise", median_us=figure, other_load=load)]


def test_the_least_disturbed_reading_is_kept_whatever_its_figure() -> None:
    readings = passes.Readings()
    for rows in (_reading(0.5, 1.0), _reading(0.3, 9.0), _reading(0.4, 2.0)):
        readings.add(rows)
    assert [row.median_us for row in readings.rows] == [9.0]
    assert readings.disturbed("user") == {Case("tiny", (8, 4)).name}
    assert readings.disturbed("preallocated") == set()


@pytest.mark.parametrize(
    ("regime", "faults", "expected"),
    [("preallocated", 20_000.0, 1.0), ("preallocated", 60.0, 0.1), ("user", 20_000.0, 0.1)],
)
def test_page_faults_disturb_where_the_regime_excludes_them(
    regime: str, faults: float, expected: float
) -> None:
    case = Case("resnet50", _LARGE)
    row = Row(regime, case, "torch.nn", other_load=0.1, page_faults=faults)
    assert passes.load([row]) == expected


def test_a_system_that_does_not_tell_the_load_gets_one_reading() -> None:
    readings = passes.Readings()
    readings.add(_reading(math.nan, 1.0))
    readings.add(_reading(math.nan, 2.0))
    assert [row.median_us for row in readings.rows] == [1.0]
    assert readings.disturbed("user") == set()


@pytest.mark.parametrize(("retry", "expected"), [(0.0, [2]), (60.0, [2, 1, 1])])
def test_disturbed_cases_are_measured_again_until_quiet(
    retry: float, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = {(8, 4): iter([0.0]), (8, 5): iter([1.0, 0.6, 0.1])}
    jobs: list[int] = []

    def fake_worker(regime: str, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        jobs.append(len(job["cases"]))
        yield {"torch": "2.13.0"}
        for item in job["cases"]:
            shape = Case.from_dict(item["case"]).shape
            rows = _reading(next(loads[shape]), 1.0, shape)
            yield {"rows": [row.to_dict() for row in rows]}

    monkeypatch.setattr(passes, "run_worker", fake_worker)
    readings = passes.Readings()
    reported: list[tuple[tuple[int, ...], bool]] = []
    passes.measure_regimes(
        {"cases": [{"case": Case("tiny", shape).to_dict()} for shape in loads]},
        ["user"],
        retry,
        readings,
        lambda row, again: reported.append((row.case.shape, again)),
    )
    assert jobs == expected
    assert reported[:2] == [((8, 4), False), ((8, 5), False)]
    assert reported[2:] == [((8, 5), True)] * (len(expected) - 1)
    assert [row.case.shape for row in readings.rows] == [(8, 4), (8, 5)]
    assert readings.torch_version == "2.13.0"


# --- regimes


def test_regimes_differ_in_the_allocator_alone_and_keep_the_users_settings() -> None:
    base = {"PATH": "here", "GLIBC_TUNABLES": "glibc.malloc.perturb=1"}
    user = regimes.environment(regimes.USER, base)
    preallocated = regimes.environment(regimes.PREALLOCATED, base)
    assert user["GLIBC_TUNABLES"] == base["GLIBC_TUNABLES"]
    assert {key for key in preallocated if preallocated[key] != user.get(key)} == {"GLIBC_TUNABLES"}
    settings = preallocated["GLIBC_TUNABLES"].split(":")
    assert settings[0] == "glibc.malloc.perturb=1"
    assert "glibc.malloc.mmap_max=0" in settings
    assert base == {"PATH": "here", "GLIBC_TUNABLES": "glibc.malloc.perturb=1"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_page_faults_are_kept_out_of_the_preallocated_regime() -> None:
    program = (
        "import resource\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "fill = lambda: len(b'x' * 2**26)\n"  # allocates 64 MiB, writes to it, frees it
        "fill()\n"
        "before = faults()\n"
        "for _ in range(4): fill()\n"
        "print((faults() - before) / 4)"
    )

    def faults(regime: str) -> float:
        base = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
        command = [sys.executable, "-c", program]
        environment = regimes.environment(regime, base)
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        return float(done.stdout)

    assert faults(regimes.USER) >= 32  # one for every 4 KiB, or for every huge page of 2 MiB
    assert faults(regimes.PREALLOCATED) < 4


def test_a_worker_that_dies_is_reported_with_its_last_words() -> None:
    with pytest.raises(regimes.WorkerFailed, match="KeyError: 'threads'"):
        list(regimes.run_worker(regimes.USER, {}))


# --- command line


def test_command_line_measures_a_tiny_case_and_writes_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--quick", "--null", "--no-compile", "--regime", "preallocated", "--threads", "1"]
    name = "tiny/32x64/contiguous/float32/backward/add+relu"
    code = main([*options, "--filter", name, "--out", str(tmp_path)])
    assert code == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["batch_norm_null.csv", "batch_norm_null.md"]
    with open(tmp_path / "batch_norm_null.csv", encoding="utf-8", newline="") as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["copy", "torch.nn", "torch.nn again"]
    again = rows["torch.nn again"]
    assert (again["regime"], again["threads"], again["error"]) == ("preallocated", "1", "")
    assert again["torch"] == torch.__version__
    assert int(again["rounds"]) >= 6
    assert float(again["median_us"]) > 0
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "batch_norm_null.md").read_text(encoding="utf-8").strip()
    assert "## Slower than 0.9 of torch.nn" in printed


@pytest.mark.parametrize("ending", [regimes.WorkerFailed("killed"), KeyboardInterrupt()])
def test_what_a_broken_run_leaves_does_not_replace_a_whole_ones_results(
    ending: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken_worker(regime: str, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"torch": "2.13.0"}
        rows = _reading(0.0, 1.0)
        yield {"rows": [row.to_dict() for row in rows]}
        raise ending

    monkeypatch.setattr(passes, "run_worker", broken_worker)
    assert main(["--quick", "--out", str(tmp_path)]) == 1
    assert {path.stem for path in tmp_path.iterdir()} == {"batch_norm_partial"}
    message = "interrupted" if isinstance(ending, KeyboardInterrupt) else "killed"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter", "no such case"], "no case is left (--full has more of them)"),
        (["--threads", "0"], "--threads must be 1 or more: 0"),
    ],
)
def test_wrong_usage_is_code_2_and_says_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_list_names_the_cases_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--suite", "tiny", "--phase", "eval"]) == 0
    names = capsys.readouterr().out.split()
    assert names == [case.name for case in cases.select(suite="tiny", phase="eval")]
    assert len(names) > 5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_steps_are_measured(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def small() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1000)
        )

    monkeypatch.setitem(steps.NETWORKS, "small", small)
    found = steps.measure("small", layout, batch=4, size=8, rounds=3)
    assert found.losses < 1e-4
    assert found.quartiles[0] <= found.ratio <= found.quartiles[1]
    assert found.line().count("|") == 7
