"""From a page to HTML.

Nothing on a page can load or run anything: a content security policy names the hashes of the
scripts that it came with and forbids all else, so that even a name that got out of its quotes,
which the template does not let it, would do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from normwise.pages.cells import cell, visible
from normwise.pages.charts import Drawing, drawing
from normwise.pages.library import HOW_TO_GET_CHARTS, charts_library
from normwise.pages.parts import SEVERITIES, Column, Page, Section, Table

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["fragment", "whole"]

LONG_NAME = 20
"""Letters. Shorter names stay in one piece."""
SCRIPTS = ("tables.js", "layers.js", "charts.js")


@cache
def _asset(name: str) -> str:
    return (files("normwise.pages") / "assets" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # What the page's own files and filters made is Markup, all else is text.
        finalize=lambda v: visible(v) if isinstance(v, str) and not isinstance(v, Markup) else v,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(name: str) -> Markup:
    """A module's name; a long one may go on in the next line after a dot."""
    parts = name.split(".") if len(name) > LONG_NAME else [name]
    return Markup(".<wbr>").join(map(escape, parts))


def _hash(script: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'"


def _slug(title: str, taken: set[str]) -> str:
    """An id for a heading; ``taken`` are those that others have."""
    stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
    slug, number = stem, 2
    while slug in taken:
        slug, number = f"{stem}-{number}", number + 1
    taken.add(slug)
    return slug


def _kinds(table: Table, column: Column) -> list[tuple[str, int]]:
    """Values of a column that filters, and how many rows have each; severities worst first."""
    counts: dict[str, int] = {}
    for row in table.rows:
        value = cell(row.get(column.key)).text
        if value:
            counts[value] = counts.get(value, 0) + 1
    if column.kind == "severity":
        known = [s for s in SEVERITIES if s in counts]
        return [(s, counts.pop(s)) for s in known] + list(counts.items())
    return list(counts.items())


def _columns(table: Table) -> list[Column]:
    """Those with something in them."""
    return [c for c in table.columns if any(cell(row.get(c.key)).text for row in table.rows)]


def _table(table: Table, taken: set[str]) -> dict[str, Any]:
    columns = _columns(table)
    rows = []
    for row in table.rows:
        cells = [cell(row.get(c.key)) for c in columns]
        rows.append({"layer": table.layer_of(row), "cells": list(zip(columns, cells, strict=True))})
    filters = [
        (c, kinds)
        for c in columns
        if c.kind in ("category", "severity") and len(kinds := _kinds(table, c)) > 1
    ]
    return {
        "id": _slug(table.title, taken),
        "title": table.title,
        "columns": columns,
        "rows": rows,
        "filters": filters,
    }


def _section(section: Section, taken: set[str], data: list[dict[str, Any]]) -> dict[str, Any]:
    """What the template reads; what the charts' script reads is added to ``data``."""
    charts = []
    for chart in section.charts:
        drawn: Drawing = drawing(chart)
        if not drawn.spec["data"]["values"]:
            continue
        names = {"x": chart.x.label, "y": chart.y.label}
        if chart.kind == "histogram":
            del names["y"]
        if chart.color is not None:
            names = {"c": chart.color.label, **names}
        if chart.layer is not None and chart.layer_key == chart.layer:
            names = {"l": "layer", **names}
        if chart.band is not None:
            names |= dict(zip(("lo", "hi"), chart.band, strict=True))
        data.append({"spec": drawn.spec, "layers": drawn.layers, "names": names})
        charts.append({"chart": chart, "notes": drawn.notes, "number": len(data) - 1})
    return {
        "id": _slug(section.title, taken),
        "section": section,
        "figures": [(name, cell(value).text) for name, value in section.figures],
        "charts": charts,
        "tables": [_table(t, taken) for t in section.tables if t.rows],
    }


def _layers(sections: list[dict[str, Any]], data: list[dict[str, Any]]) -> list[str]:
    """All modules of the page, each once."""
    named = [row["layer"] for s in sections for t in s["tables"] for row in t["rows"]]
    named += [name for one in data for name in one["layers"]]
    return list(dict.fromkeys(name for name in named if name is not None))


def whole(page: Page) -> str:
    """The page as a file."""
    taken = {"top", "main", "layer-bar"}
    data: list[dict[str, Any]] = []
    sections = [_section(s, taken, data) for s in page.sections]
    library = charts_library() if data else None
    scripts = [_asset(name) for name in SCRIPTS]
    if library is not None:
        scripts.insert(0, library)
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=page.title,
            sections=sections,
            layers=_layers(sections, data),
            data=data,
            style=_asset("page.css"),
            scripts=scripts,
            hashes=" ".join(map(_hash, scripts)),
            note=HOW_TO_GET_CHARTS if data and library is None else None,
        )
    )


def fragment(page: Page) -> str:
    """The page without scripts and style."""
    taken: set[str] = set()
    sections = [_section(replace(s, charts=()), taken, []) for s in page.sections]
    return _environment().get_template("fragment.html").render(sections=sections)
