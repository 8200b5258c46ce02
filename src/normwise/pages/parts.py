"""What stands on a page, as data: sections with figures, charts and tables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from normwise.files import write_atomically
from normwise.pages.cells import shown

__all__ = ["SEVERITIES", "Axis", "Chart", "Column", "Page", "Section", "Table"]

SEVERITIES = ("error", "warning", "info")
"""Worst first; a ``severity`` column sorts and colours by them."""


@dataclass(frozen=True)
class Column:
    """A column of a table; a cell is ``row[key]``.

    kind: 'text' reads left, 'number' right; 'layer' is a module's name, which links all places
    where the module occurs; 'category' gets a button for each of its values that filters the rows,
    and so does 'severity', whose values are :data:`SEVERITIES`.
    """

    key: str
    label: str
    kind: Literal["text", "number", "layer", "category", "severity"] = "text"


@dataclass(frozen=True)
class Table:
    """Rows that can be sorted by any column and filtered by text."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]

    def layer_of(self, row: Mapping[str, Any]) -> str | None:
        """The module that a row is about."""
        for column in self.columns:
            if column.kind == "layer" and row.get(column.key):
                return shown(row[column.key])
        return None


@dataclass(frozen=True)
class Axis:
    """What is drawn along an axis or as colour; a value is ``row[key]``.

    kind: 'number', 'category', 'severity' or 'layer' (a module's name). log: a logarithmic scale;
    what is not above 0 is not drawn, and the page says how many that were. format: of the labels,
    as d3-format has it (``'.0%'``). values: all categories, where charts shall give them the same
    colours though not each has all.
    """

    key: str
    label: str
    kind: Literal["number", "category", "severity", "layer"] = "number"
    log: bool = False
    format: str | None = None
    values: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """A chart as data: one mark a row.

    kind: 'bar' (numbers of one category add up), 'scatter', 'line', 'histogram' (of ``x``; ``y`` is
    not read). Layers and categories stand along ``x``; the page turns them upright where names
    need the room.

    Attributes:
        description: what it shows, in a sentence; screen readers read it.
        color: what tells marks, or lines, apart.
        layer: the key of the module that a mark belongs to, if neither axis is it.
        band: keys of the lower and the upper border of a band around each line.
        joined: a 'scatter' whose marks of the same layer are joined, such as before and after.
        choose: one layer at a time is drawn, from a menu.
        rules: numbers of the ``y`` axis marked by a line, and what they are.
    """

    kind: Literal["bar", "scatter", "line", "histogram"]
    title: str
    description: str
    rows: Sequence[Mapping[str, Any]]
    x: Axis
    y: Axis = Axis("", "count")
    color: Axis | None = None
    layer: str | None = None
    band: tuple[str, str] | None = None
    joined: bool = False
    choose: bool = False
    rules: Sequence[tuple[float, str]] = ()

    @property
    def layer_key(self) -> str | None:
        """The key of the module that a mark belongs to."""
        for axis in (self.x, self.y):
            if axis.kind == "layer":
                return axis.key
        return self.layer


@dataclass(frozen=True)
class Section:
    """A heading with what belongs to it.

    verdict: how it came out, in a line. summary: lines of text. figures: names and values, few.
    """

    title: str
    summary: Sequence[str] = ()
    verdict: tuple[Literal["good", "bad"], str] | None = None
    figures: Sequence[tuple[str, Any]] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """Sections under one title."""

    title: str
    sections: Sequence[Section]

    def html(self) -> str:
        """The page as one file that needs nothing else.

        Charts need the package ``vl-convert-python`` (``pip install 'normwise[report]'``), which
        holds Vega-Lite and its JavaScript. Without it their data are there as tables.
        """
        from normwise.pages.render import whole

        return whole(self)

    def fragment(self) -> str:
        """Headings, text and tables alone, for a notebook."""
        from normwise.pages.render import fragment

        return fragment(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`html` to ``path``, in one piece.

        Raises:
            OutputError: if ``path`` cannot be written to.
        """
        page = self.html().encode()
        write_atomically(path, lambda file: file.write(page))
