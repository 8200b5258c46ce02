"""What a tool gives back: a model, and a report that says what became of each norm.

Every tool on modules (fold, recalibrate, convert, accelerate) returns a :class:`Result`, so that
one way of reading, printing and saving serves them all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import Tensor

from normwise.pages import Axis, Chart, Column, Page, Section, Table
from normwise.pages.cells import is_number, shown

__all__ = ["Entry", "Report", "Result", "counted", "label", "number", "plain"]

M = TypeVar("M")
R = TypeVar("R", bound="Report")


def plain(value: Any, *, finite: bool = True) -> Any:
    """``value`` as JSON knows it: tensors as lists, inf and NaN as None if ``finite``."""
    if isinstance(value, Tensor):
        return plain(value.tolist(), finite=finite)
    if isinstance(value, Mapping):
        return {str(k): plain(v, finite=finite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, finite=finite) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) or not finite else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def number(value: Any) -> float:
    """A figure that may have gone through JSON, which has no NaN: there it is None."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Entry:
    """What became of one norm.

    name: the module's qualified name. action: what was done. into: the module that it went into.
    reason: why. facts: figures, by name.
    """

    name: str
    action: str
    into: str | None = None
    reason: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        own = {"name": self.name, "action": self.action, "into": self.into, "reason": self.reason}
        return {**own, **plain(self.facts)}


class Report:
    """The norms of a model and what became of each; prints as a table, also in a notebook.

    Attributes:
        entries: one :class:`Entry` a norm, in the order in which the model runs them.
        facts: figures of the whole model, by name.
    """

    title: ClassVar[str] = "report"
    columns: ClassVar[tuple[str, ...]] = ()
    """Facts of an entry that the table shows, besides name, action, into and reason."""

    def __init__(self, entries: Sequence[Entry], facts: Mapping[str, Any] | None = None) -> None:
        self.entries = tuple(entries)
        self.facts: dict[str, Any] = dict(facts or {})

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> Entry:
        """The entry of the norm with this qualified name."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(name)

    def summary(self) -> list[str]:
        """The report in a line or a few."""
        counts: dict[str, int] = {}
        for entry in self.entries:
            counts[entry.action] = counts.get(entry.action, 0) + 1
        return [", ".join(f"{n} {action}" for action, n in counts.items()) or "no norms"]

    def _table(self) -> tuple[list[str], list[list[str]]]:
        named = [("name", "name"), ("action", "action"), ("into", "into"), ("reason", "why")]
        heads, cells = [], []
        for attribute, head in named:
            column = [shown(getattr(e, attribute)) for e in self.entries]
            if any(column):
                heads.append(head)
                cells.append(column)
        for fact in self.columns:
            column = [shown(e.facts.get(fact)) for e in self.entries]
            if any(column):
                heads.append(fact)
                cells.append(column)
        return heads, [list(row) for row in zip(*cells, strict=True)]

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        columns, rows = self._table()
        out = StringIO()
        console = Console(file=out, width=160, color_system=None, highlight=False, markup=False)
        for line in self.summary():
            console.print(line, soft_wrap=True)
        if rows:
            table = Table(*columns, box=box.SIMPLE)
            for row in rows:
                table.add_row(*row)
            console.print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()[0]}>"

    # The page

    def charts(self) -> list[Chart]:
        """What the page draws: how many norms came to what, if not all to the same."""
        return counted(self.entries)

    def tables(self) -> list[Table]:
        """The entries, with the facts of :attr:`columns`."""
        columns = [
            Column("name", "name", "layer"),
            Column("action", "action", "category"),
            Column("into", "into"),
            Column("reason", "why", "category"),
        ]
        for fact in self.columns:
            values = [e.facts.get(fact) for e in self.entries]
            numbers = all(v is None or is_number(v) for v in values)
            columns.append(Column(f"fact {fact}", label(fact), "number" if numbers else "text"))
        rows = []
        for entry in self.entries:
            own = {k: getattr(entry, k) for k in ("name", "action", "into", "reason")}
            facts = {f"fact {name}": entry.facts.get(name) for name in self.columns}
            rows.append({**own, **plain(facts, finite=False)})
        return [Table("Norm by norm", columns, rows)]

    def figures(self) -> list[tuple[str, Any]]:
        """Names and values that the page shows large."""
        return []

    def verdict(self) -> tuple[Literal["good", "bad"], str] | None:
        """How it came out, in a line, if there was something that could come out badly."""
        return None

    def sections(self) -> list[Section]:
        """What stands on the report's page (:mod:`normwise.pages`)."""
        return [
            Section(
                title=self.title,
                summary=self.summary(),
                verdict=self.verdict(),
                figures=self.figures(),
                charts=self.charts(),
                tables=self.tables(),
            )
        ]

    def page(self) -> Page:
        """The report as a page of its own."""
        return Page(f"normwise {self.title}", self.sections())

    def _repr_html_(self) -> str:
        return self.page().fragment()

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON knows it (numbers that are not finite as None)."""
        entries = [e.to_dict() for e in self.entries]
        return {"title": self.title, **plain(self.facts), "entries": entries}

    @classmethod
    def from_dict(cls: type[R], data: Mapping[str, Any]) -> R:
        """The report that :meth:`to_dict` wrote; what it wrote as None is None."""
        own = ("name", "action", "into", "reason")
        entries = [
            Entry(
                e["name"],
                e["action"],
                e.get("into"),
                e.get("reason"),
                {k: v for k, v in e.items() if k not in own},
            )
            for e in data["entries"]
        ]
        return cls(entries, {k: v for k, v in data.items() if k not in ("title", "entries")})

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one page that needs nothing else (docs/report.md), in one piece.

        Charts need ``pip install 'normwise[report]'``; without it their data are tables.

        Raises:
            OutputError: if ``path`` cannot be written to.
        """
        self.page().save(path)


def counted(entries: Sequence[Entry]) -> list[Chart]:
    """One chart of how many entries came to each action, and why; none if all came to one."""
    counts: dict[tuple[str, str], int] = {}
    for e in entries:
        key = (e.action, e.reason or "no reason needed")
        counts[key] = counts.get(key, 0) + 1
    if len(counts) < 2:
        return []
    return [
        Chart(
            "bar",
            "What became of the norms",
            "How many came to each end, and why.",
            [{"action": a, "why": why, "norms": n} for (a, why), n in counts.items()],
            x=Axis("action", "action", "category"),
            y=Axis("norms", "norms", format="~d"),
            color=Axis("why", "why", "category") if len({w for _, w in counts}) > 1 else None,
        )
    ]


def label(name: str) -> str:
    """``'shift_before'`` as it stands over a column."""
    return name.replace("_", " ")


@dataclass(frozen=True)
class Result(Generic[M, R]):
    """``result.model`` and ``result.report``; unpacks as ``model, report = …`` too."""

    model: M
    report: R

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.report

    def __str__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """:meth:`Report.save_html`."""
        self.report.save_html(path)
