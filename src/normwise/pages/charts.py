"""A :class:`~normwise.pages.Chart` as Vega-Lite.

Fields have names of ours (``x``, ``y``, ``c``, ``l``): names of strangers are data and never part
of an expression. Colours and sizes of text are the style sheet's, which knows light and dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from normwise.pages.cells import finite, shown
from normwise.pages.parts import SEVERITIES, Axis, Chart

__all__ = ["Drawing", "drawing"]

# At least 3 : 1 against white and against the dark page; told apart by most of the colour-blind.
PALETTE = ("#3a7fc1", "#d5603a", "#2f9672", "#a066b0", "#b8860b", "#7f8994")
SEVERITY_COLORS = ("#d64545", "#c07c14", "#3a7fc1")
MOST_NAMES = 40
"""More names than these do not stand along an axis; a mark says its own when pointed at."""
MOST_POINTS = 20_000
"""Of a line chart; 1.5 MB with a band. More are thinned."""
PLAIN_HEIGHT, STEP = 240, 22

_SHOWN = "picked === null || datum.l === picked"
_DECADE = "abs(log(datum.value) / LN10 - round(log(datum.value) / LN10)) < 1e-6"
_TRIMMED = "length(datum.label) > room ? '…' + slice(datum.label, -room) : datum.label"


@dataclass(frozen=True)
class Drawing:
    """spec: Vega-Lite. layers: the modules that have marks, in order. notes: what is not drawn."""

    spec: dict[str, Any]
    layers: tuple[str, ...]
    notes: tuple[str, ...]


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(v for v in values if v is not None))


def _value(axis: Axis, row: Mapping[str, Any]) -> Any:
    """What is drawn; None if nothing can be."""
    value = row.get(axis.key)
    if axis.kind != "number":
        return None if value is None else shown(value)
    number = finite(value)
    if number is None or (axis.log and number <= 0):
        return None
    return float(f"{number:.6g}")


def _thinned(chart: Chart) -> tuple[list[Mapping[str, Any]], int]:
    """The rows and which share of a line's places they are (1: all, 2: every other, ...)."""
    rows = list(chart.rows)
    every = -(-len(rows) // MOST_POINTS)
    if chart.kind != "line" or every <= 1:
        return rows, 1
    places = _distinct(row.get(chart.x.key) for row in rows)
    kept = {*places[::every], places[-1]}
    return [row for row in rows if row.get(chart.x.key) in kept], every


def _data(chart: Chart, rows: list[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The marks, and how many values cannot be drawn."""
    axes = {"x": chart.x} if chart.kind == "histogram" else {"x": chart.x, "y": chart.y}
    key, marks, missing = chart.layer_key, [], 0
    for row in rows:
        mark: dict[str, Any] = {name: _value(axis, row) for name, axis in axes.items()}
        if None in mark.values():
            # None was never there; what is there and cannot be drawn is told.
            bad = (axis.key for name, axis in axes.items() if mark[name] is None)
            missing += any(row.get(key) is not None for key in bad)
            continue
        if chart.color is not None:
            mark["c"] = shown(row.get(chart.color.key))
        mark["l"] = None if key is None or row.get(key) is None else shown(row[key])
        if chart.band is not None:
            lower, upper = (finite(row.get(k)) for k in chart.band)
            if lower is not None and upper is not None:
                mark["lo"], mark["hi"] = lower, upper
        marks.append(mark)
    return marks, missing


def _axis(axis: Axis, name: str, *, named: bool = True) -> dict[str, Any]:
    """An encoding. named: there is room for the names of categories."""
    if axis.kind == "number":
        scale: dict[str, Any] = {"type": "log"} if axis.log else {"zero": False, "nice": True}
        look: dict[str, Any] = {"tickCount": 5}
        form = axis.format or (".0e" if axis.log else None)
        if form:
            look["format"] = form
        if form == "~d" or axis.log:
            # Lines and labels at whole numbers, or powers of ten, alone.
            at = _DECADE if axis.log else "datum.value % 1 === 0"
            look |= {"ticks": False, "labelExpr": f"{at} ? datum.label : ''"}
            look["gridOpacity"] = {"condition": {"test": at, "value": 1}, "value": 0}
        own = {"field": name, "title": axis.label}
        return {**own, "type": "quantitative", "scale": scale, "axis": look}
    if named:
        look = {"title": None, "labelExpr": _TRIMMED, "labelLimit": 0, "ticks": False}
        look["labelPadding"] = 8
    else:
        look = {"title": f"{axis.label}, in order", "labels": False, "ticks": False}
    return {"field": name, "title": axis.label, "type": "nominal", "sort": None, "axis": look}


def _color(chart: Chart, marks: list[dict[str, Any]]) -> dict[str, Any]:
    axis = chart.color
    if axis is None:
        return {"value": PALETTE[0]}
    if axis.kind == "severity":
        domain, colors = list(SEVERITIES), list(SEVERITY_COLORS)
    else:
        used = _distinct(mark["c"] for mark in marks)
        known = _distinct([*axis.values, *used])
        domain = [name for name in known if name in used]
        colors = [PALETTE[known.index(name) % len(PALETTE)] for name in domain]
    scale = {"domain": domain, "range": colors}
    own = {"field": "c", "title": axis.label, "type": "nominal"}
    return {**own, "scale": scale, "legend": {"title": None}}


def _tooltip(chart: Chart) -> list[dict[str, Any]]:
    own = [("x", chart.x), ("y", chart.y)]
    if chart.kind == "histogram":
        x = {"field": "x", "bin": {"maxbins": 30}, "title": chart.x.label}
        return [x, {"aggregate": "count", "title": chart.y.label}]
    if chart.color is not None:
        own.insert(0, ("c", chart.color))
    if chart.layer is not None and chart.layer_key == chart.layer:
        own.insert(0, ("l", Axis(chart.layer, "layer", "layer")))
    fields: list[dict[str, Any]] = []
    for name, axis in own:
        field: dict[str, Any] = {"field": name, "title": axis.label or name, "type": "nominal"}
        if axis.kind == "number":
            field |= {"type": "quantitative", "format": axis.format or ".4~g"}
        fields.append(field)
    if chart.band is not None:
        fields += [
            {"field": name, "title": title, "type": "quantitative", "format": ".4~g"}
            for name, title in zip(("lo", "hi"), chart.band, strict=True)
        ]
    return fields


def _marks(
    chart: Chart, x: dict[str, Any], y: dict[str, Any], turned: bool
) -> list[dict[str, Any]]:
    """The layers of the drawing, in Vega-Lite's sense of the word."""
    across = {"x": y, "y": x} if turned else {"x": x, "y": y}
    tooltip = _tooltip(chart)
    if chart.kind == "histogram":
        binned = {**x, "bin": {"maxbins": 30}}
        count = {"aggregate": "count", "type": "quantitative", "axis": {"title": chart.y.label}}
        return [{"mark": "bar", "encoding": {"x": binned, "y": count, "tooltip": tooltip}}]
    if chart.kind == "bar":
        bars = {"type": "bar", "cornerRadiusEnd": 2}
        return [{"mark": bars, "encoding": {**across, "tooltip": tooltip}}]
    points = {"mark": {"type": "point", "filled": True, "size": 60}}
    points["encoding"] = {**across, "tooltip": tooltip}
    if chart.kind == "scatter":
        if not chart.joined:
            return [points]
        joint = {
            **across,
            "detail": {"field": "l", "type": "nominal"},
            "color": {"value": "#7f8994"},
        }
        return [{"mark": {"type": "line", "strokeWidth": 1.5}, "encoding": joint}, points]
    layers: list[dict[str, Any]] = []
    if chart.band is not None:
        borders = {"x": x, "y": {**y, "field": "lo"}, "y2": {"field": "hi"}}
        layers.append({"mark": {"type": "area", "fillOpacity": 0.2}, "encoding": borders})
    layers.append({"mark": {"type": "line", "strokeWidth": 2}, "encoding": across})
    # The point nearest to the pointer answers, not only the pixel under it.
    near = {"type": "point", "nearest": True, "on": "pointerover", "clear": "pointerout"}
    points["params"] = [{"name": "near", "select": near}]  # type: ignore[assignment] # a dict of any
    visible = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    points["encoding"]["opacity"] = visible
    return [*layers, points]


def _rules(chart: Chart, turned: bool) -> list[dict[str, Any]]:
    side = "x" if turned else "y"
    layers = []
    for value, label in chart.rules:
        place = {"datum": value, "type": "quantitative"}
        rule = {"type": "rule", "strokeDash": [5, 4], "color": "#7f8994", "tooltip": label}
        layers.append({"mark": rule, "encoding": {side: place}})
    return layers


def drawing(chart: Chart) -> Drawing:
    """``chart`` for vega-embed; the page sets ``picked`` (a layer) and ``room`` (letters)."""
    rows, every = _thinned(chart)
    marks, missing = _data(chart, rows)
    modules = tuple(_distinct(mark["l"] for mark in marks))
    names = _distinct(mark["x"] for mark in marks)
    by_name = chart.x.kind != "number"
    turned = by_name and len(names) <= MOST_NAMES
    x, y = _axis(chart.x, "x", named=turned), _axis(chart.y, "y")
    if chart.kind == "bar" and not chart.y.log:
        y["scale"] = {"zero": True}  # a bar's length is the number
    layers = _marks(chart, x, y, turned)
    for layer in layers:
        layer["encoding"].setdefault("color", _color(chart, marks))
        layer["encoding"].setdefault("opacity", _dimmed(chart))
    params: list[dict[str, Any]] = [
        {"name": "picked", "value": None},
        {"name": "room", "value": 24},
    ]
    spec: dict[str, Any] = {
        "description": f"{chart.title}. {chart.description}",
        "width": "container",
        "height": STEP * max(2, len(names)) if turned else PLAIN_HEIGHT,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": marks},
        "params": params,
        "layer": [*layers, *_rules(chart, turned)],
    }
    if chart.color is not None:
        layers[-1].setdefault("params", []).append(
            {"name": "series", "select": {"type": "point", "fields": ["c"]}, "bind": "legend"}
        )
    if chart.choose and modules:
        menu = {"input": "select", "options": list(modules), "name": "Show layer"}
        params.append({"name": "chosen", "value": modules[0], "bind": menu})
        spec["transform"] = [{"filter": "datum.l === chosen"}]
    notes = []
    if missing:
        why = "not above 0 or not finite" if chart.x.log or chart.y.log else "not finite"
        notes.append(f"{missing} of {len(rows)} are not drawn: {why}")
    if every > 1:
        notes.append(f"one step in {every} is drawn, of {len(chart.rows):,} values")
    return Drawing(spec, modules, tuple(notes))


def _dimmed(chart: Chart) -> dict[str, Any]:
    """Marks of the layer that is picked, and of the group picked in the legend, stand out."""
    shown_ = _SHOWN if chart.layer_key is not None and not chart.choose else "true"
    test: Any = {"and": [{"param": "series"}, shown_]} if chart.color is not None else shown_
    return {"condition": {"test": test, "value": 1}, "value": 0.15}
