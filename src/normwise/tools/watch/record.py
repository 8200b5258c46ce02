"""What was watched, norm by norm: rows of plain numbers, and a report of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from normwise.errors import InputError, message
from normwise.pages import Chart
from normwise.pages.training import curves, percentiles
from normwise.results import Entry, Report, plain
from normwise.tools.watch.call import columns
from normwise.tools.watch.files import read_rows

__all__ = ["WatchRecord"]


class _Series:
    """The rows of one norm, call and mode, at most so many, evenly spaced however long it runs."""

    def __init__(self, keep: int) -> None:
        self.keep, self.stride, self.seen = keep, 1, 0
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.last: dict[str, Any] = {}

    def add(self, number: int, row: dict[str, Any]) -> None:
        self.last = row
        if self.seen % self.stride == 0:
            self.rows.append((number, row))
            if len(self.rows) > self.keep:
                del self.rows[1::2]
                self.stride *= 2
        self.seen += 1


class WatchRecord(Report):
    r"""What :func:`normwise.watch` recorded, while it records and afterwards.

    ``rows`` holds a dict for each measured call of each norm; ``data()`` the same as columns. Of
    a long run every second, fourth, … row is dropped where a norm has more than ``keep`` (the file
    has all); ``last`` figures in the entries are of the last one whatever was dropped.

    Columns:
        step: training forwards of the model before this one, from ``start``.
        mode: 'train' or 'eval', of the model; training: of the norm itself, which may be frozen.
        name, kind: the norm's qualified name and its class; call: 0 for its first in a forward.
        values: of its input, padding included; nonfinite: how many of those that count are inf
            or NaN.
        input_p50, output_p50, gamma_p50, beta_p50 and so on: percentiles of a sample of the
            finite values; gamma and beta in the row of call 0 only.
        shift, shift_median: the largest and the median over the channels of
            :math:`|\mu - m| / \sqrt{s^2 + \epsilon}`, the running mean against the batch's, in
            standard deviations of the batch, before this batch moved it; log_var,
            log_var_median: :math:`\log((\sigma^2 + \epsilon) / (s^2 + \epsilon))` of the largest
            magnitude, and the median magnitude. Over the whole batch of this process, not over a
            sample. None of norms that remember nothing.
        gamma_grad, beta_grad, input_grad: 2-norms of the gradients that the first backward brought.
            That of the input is of the tensor, whoever else reads it. In the row of call 0 those
            of gamma and beta are of all calls together.
        nonfinite_grads: how many of these norms are inf or NaN.

    Facts of an entry (``record["layer1.bn"].facts``): kind, rows, calls (the most in one forward),
    nonfinite (in all rows), and the last training row's shift, log_var and gradient norms. Of the
    whole: steps, eval_passes, every, seconds (spent in measuring and writing).
    """

    title: ClassVar[str] = "watch"
    columns: ClassVar[tuple[str, ...]] = (
        "kind", "rows", "calls", "nonfinite", "shift", "log_var",
        "gamma_grad", "beta_grad", "input_grad",
    )  # fmt: skip

    def __init__(
        self,
        names: Iterable[str] = (),
        percentiles: Sequence[float] = (1, 15, 50, 85, 99),
        every: int = 1,
        start: int = 0,
        keep: int = 2000,
    ) -> None:
        self.names = list(names)
        self.percentiles = tuple(percentiles)
        self.every, self.start, self.keep = every, start, keep
        self.steps, self.eval_passes, self.seconds = start, 0, 0.0
        self._added = 0
        self._series: dict[tuple[str, int, str], _Series] = {}
        self._totals: dict[str, dict[str, Any]] = {}
        super().__init__(())
        self._renew()

    # -- growing --------------------------------------------------------------------------------

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take in rows that were measured, in order."""
        for row in rows:
            name = row["name"]
            key = (name, row["call"], row["mode"])
            if key not in self._series:
                self._series[key] = _Series(self.keep)
            self._series[key].add(self._added, row)
            self._added += 1
            total = self._totals.setdefault(name, {"rows": 0, "calls": 0, "nonfinite": 0})
            total["kind"] = row["kind"]
            total["rows"] += 1
            total["calls"] = max(total["calls"], row["call"] + 1)
            total["nonfinite"] += row["nonfinite"] or 0
        self._renew()

    def _renew(self) -> None:
        """Entries in the order of the first calls; norms that were never called at the end."""
        shown = ("shift", "log_var", "gamma_grad", "beta_grad", "input_grad")
        entries = []
        for name, total in self._totals.items():
            series = self._series.get((name, 0, "train")) or self._series.get((name, 0, "eval"))
            last = {} if series is None else {f: series.last[f] for f in shown}
            entries.append(Entry(name, "watched", facts={**total, **last}))
        silent = (name for name in self.names if name not in self._totals)
        entries += [Entry(name, "left", reason="never-called") for name in silent]
        self.entries = tuple(entries)
        self.facts = {
            "steps": self.steps,
            "eval_passes": self.eval_passes,
            "every": self.every,
            "seconds": round(self.seconds, 4),
        }

    # -- reading --------------------------------------------------------------------------------

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        """All rows that are kept, in the order in which they were measured."""
        numbered = [one for series in self._series.values() for one in series.rows]
        return tuple(row for _, row in sorted(numbered, key=lambda one: one[0]))

    def data(self) -> dict[str, list[Any]]:
        """The rows as columns, as ``pandas.DataFrame`` and ``polars.DataFrame`` take them."""
        rows = self.rows
        return {c: [row[c] for row in rows] for c in columns(self.percentiles)}

    def series(
        self, name: str, *fields: str, mode: str = "train", call: int = 0
    ) -> list[list[Any]]:
        """The steps of one norm, then for each of ``fields`` its values at these steps.

        Raises:
            KeyError: for a field that is no column, or a norm that has no such rows.
        """
        rows = [row for _, row in self._series[name, call, mode].rows]
        return [[row[f] for row in rows] for f in ("step", *fields)]

    def summary(self) -> list[str]:
        steps = self.steps - self.start
        if not self._added:
            return [f"no call of {len(self.names)} norms was seen in {steps} training steps"]
        watched = super().summary()[0]
        return [
            f"{watched}: {self._added} rows of {steps} training steps and {self.eval_passes} "
            f"forwards in eval mode (every {self.every}); {self.seconds:.3g} s spent on it"
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON knows it; ``rows`` as columns."""
        return {**super().to_dict(), "rows": plain(self.data())}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WatchRecord:
        """The record that :meth:`to_dict` wrote."""
        held = data["rows"]
        rows = [dict(zip(held, row, strict=True)) for row in zip(*held.values(), strict=True)]
        record = cls._of_rows(rows, [c.removeprefix("input_p") for c in held if "input_p" in c])
        record.names = [e["name"] for e in data["entries"]]
        record.steps, record.eval_passes = int(data["steps"]), int(data["eval_passes"])
        record.every, record.seconds = int(data["every"]), float(data["seconds"])
        record._renew()
        return record

    @classmethod
    def _of_rows(cls, rows: Sequence[dict[str, Any]], found: Sequence[str]) -> WatchRecord:
        """``found``: what follows ``input_p`` in the names of the columns."""
        record = cls(
            percentiles=[float(p) for p in found] or (1, 15, 50, 85, 99), keep=max(len(rows), 1)
        )
        steps = sorted({row["step"] for row in rows if row["mode"] == "train"})
        if steps:
            record.start, record.steps = steps[0], steps[-1] + 1
            record.every = steps[1] - steps[0] if len(steps) > 1 else 1
        record.add(rows)
        return record

    def charts(self) -> list[Chart]:
        """Percentiles of inputs and outputs, statistics and gradients through training."""
        rows = [r for r in self.rows if r["mode"] == "train" and r["call"] == 0]
        if not rows:
            return []
        names = [f"p{p:g}" for p in self.percentiles]
        made = [
            percentiles(
                rows,
                f"{which.capitalize()}s of each norm",
                f"The {names[len(names) // 2]} of a sample of the {which}s, in a band from "
                f"{names[0]} to {names[-1]}.",
                [f"{which}_{name}" for name in names],
                [f"{which} {name}" for name in names],
            )
            for which in ("input", "output")
        ]
        made.append(
            curves(
                rows,
                "Running against batch statistics",
                "The distance of the running mean, in standard deviations of the batch, and of the "
                "log of the variance: the largest over the channels.",
                {"shift": "mean", "log_var": "log variance"},
                label="distance",
            )
        )
        made.append(
            curves(
                rows,
                "Gradients",
                "The 2-norms of the gradients of γ, β and the input.",
                {"gamma_grad": "γ", "beta_grad": "β", "input_grad": "input"},
                label="2-norm",
            )
        )
        return made

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WatchRecord:
        """The record of a ``.jsonl`` or ``.parquet`` file that :func:`normwise.watch` wrote, also
        of one that a crash ended: what is no whole line at its end is left out.

        Raises:
            InputError: if the file holds something else.
            OSError: if it cannot be read.
            MissingDependencyError: for Parquet without pyarrow (``normwise[watch]``).
        """
        rows = read_rows(path)
        found = [c.removeprefix("input_p") for c in (rows[0] if rows else ()) if "input_p" in c]
        try:
            given = [float(p) for p in found]
        except ValueError:
            given = []
        wanted = set(columns(given))
        if rows and (not given or any(not wanted <= row.keys() for row in rows)):
            raise InputError(
                message(
                    "a record of watch has its columns in each row",
                    f"{os.fspath(path)!r} with others",
                    "one file for each setting of percentiles=",
                )
            )
        return cls._of_rows(rows, found)
