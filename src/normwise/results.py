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
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from normwise.files import write_atomically

__all__ = ["Entry", "Report", "Result", "plain"]


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: tensors as lists, inf and NaN as None, the rest as it is."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def _shown(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return str(value)


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


_PAGE = """\
{% macro table(columns, rows) -%}
<table><thead><tr>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for v in row %}<td>{{ v }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table>
{%- endmacro %}
{% if whole %}<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark; } body { font: 15px system-ui, sans-serif; margin: 2rem; }
table { border-collapse: collapse; } td, th { padding: .3rem .7rem; text-align: left; }
tr + tr td, tbody td { border-top: 1px solid #8884; font-variant-numeric: tabular-nums; }
</style></head><body>{% endif %}
<h3>{{ title }}</h3>
<p>{% for line in summary %}{{ line }}<br>{% endfor %}</p>
{% if rows %}{{ table(columns, rows) }}{% endif %}
{% if whole %}</body></html>{% endif %}
"""


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
            column = [_shown(getattr(e, attribute)) for e in self.entries]
            if any(column):
                heads.append(head)
                cells.append(column)
        for fact in self.columns:
            column = [_shown(e.facts.get(fact)) for e in self.entries]
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

    def _html(self, whole: bool) -> str:
        from jinja2 import Environment

        columns, rows = self._table()
        page = Environment(autoescape=True).from_string(_PAGE)
        return page.render(
            whole=whole, title=self.title, summary=self.summary(), columns=columns, rows=rows
        )

    def _repr_html_(self) -> str:
        return self._html(whole=False)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON knows it (numbers that are not finite as None)."""
        entries = [e.to_dict() for e in self.entries]
        return {"title": self.title, **plain(self.facts), "entries": entries}

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one file that needs nothing else, in one piece.

        Raises:
            OutputError: if ``path`` cannot be written to.
        """
        page = self._html(whole=True).encode()
        write_atomically(path, lambda file: file.write(page))


M = TypeVar("M")
R = TypeVar("R", bound=Report)


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
