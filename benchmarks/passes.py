"""Measuring all cases, and those again that other programs disturbed.

On a shared machine a case can be off by far more than what is to be seen.  Which cases those are is
told by the load of other programs while they ran (`benchmarks.machine.other_load`), and by page
faults where the regime promises none, not by their figures: measuring only what looks bad again
would be a selection of good luck.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .cases import Case
from .regimes import PREALLOCATED, run_worker
from .rows import Row

QUIET = 0.15  # cores; a third of a second of clock ticks tells no less
MOST_PASSES = 4


@dataclasses.dataclass
class Readings:
    """The least disturbed rows of each case so far, in the order in which cases came."""

    torch_version: str = ""
    by_case: dict[tuple[str, str], list[Row]] = dataclasses.field(default_factory=dict)

    def add(self, rows: list[Row]) -> None:
        key = rows[0].regime, rows[0].case.name
        before = self.by_case.get(key)
        if before is None or load(rows) < load(before):
            self.by_case[key] = rows

    def disturbed(self, regime: str) -> set[str]:
        """Names of the cases with more than `QUIET` cores of `load`."""
        return {
            name
            for (where, name), rows in self.by_case.items()
            if where == regime and load(rows) > QUIET
        }

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.by_case.values() for row in rows]


def load(rows: Iterable[Row]) -> float:
    """Cores that others used during the case, or 1 where memory was not there beforehand though the
    regime says so; zero where nobody can tell."""
    rows = list(rows)
    others = max((row.other_load for row in rows if row.other_load >= 0), default=0.0)
    return max(others, 1.0) if any(map(_faults, rows)) else others


def _faults(row: Row) -> bool:
    """Whether a call met fresh pages for more than a twentieth of an output.

    torch.nn's backward of (32, 256, 56, 56): 19 ms without, 290 ms with 12,544 faults a call.
    """
    pages = row.case.megabytes * 1e6 / 4096
    return row.regime == PREALLOCATED and row.page_faults > max(0.05 * pages, 64)


def measure_regimes(
    job: dict[str, Any],
    regimes: Sequence[str],
    retry: float,
    readings: Readings,
    report: Callable[[Row, bool], None],
) -> None:
    """Fill `readings`; what is in it when a worker fails is good.

    Up to `retry` seconds go into measuring disturbed cases again, after all have been measured:
    the neighbour may have finished by then.
    """
    for regime in regimes:
        _one_pass(regime, job, readings, lambda row: report(row, False))
    deadline = time.monotonic() + retry
    for _ in range(1, MOST_PASSES):
        for regime in regimes:
            names = readings.disturbed(regime)
            again = [item for item in job["cases"] if _name(item) in names]
            if again and time.monotonic() < deadline:
                smaller = {**job, "cases": again}
                _one_pass(regime, smaller, readings, lambda row: report(row, True), deadline)


def _name(item: dict[str, Any]) -> str:
    return Case.from_dict(item["case"]).name


def _one_pass(
    regime: str,
    job: dict[str, Any],
    readings: Readings,
    report: Callable[[Row], None],
    deadline: float = float("inf"),
) -> None:
    for message in run_worker(regime, job):
        if "torch" in message:
            readings.torch_version = message["torch"]
            continue
        rows = [Row.from_dict(fields) for fields in message["rows"]]
        readings.add(rows)
        report(rows[0])
        if time.monotonic() > deadline:
            break
