"""Results from JSON, which anybody may have written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from normwise.errors import InputError, message
from normwise.report.compose import Shown
from normwise.report.demo import DemoView
from normwise.results import Report

__all__ = ["from_dict", "load"]

# Where reports are defined: theirs are the titles that can be read.
MODULES = (
    "normwise.doctor.repairing",
    "normwise.doctor.report",
    "normwise.graph.report",
    "normwise.tools.accelerate",
    "normwise.tools.bench",
    "normwise.tools.convert",
    "normwise.tools.equalization",
    "normwise.tools.quantization",
    "normwise.tools.recalibrate",
    "normwise.tools.watch",
)
LARGEST = 64 * 2**20
"""Bytes. A check of 10,000 layers with a finding each has 5 MB."""
_WHAT = "a result is JSON that normwise wrote (--json, or report.to_dict())"
_HINT = "the file of normwise check --json, or json.dump(report.to_dict(), file)"


def _kinds(base: type[Report] = Report) -> Iterator[type[Report]]:
    for kind in base.__subclasses__():
        if kind.__module__.startswith("normwise."):
            yield kind
        yield from _kinds(kind)


def _refused(got: str) -> InputError:
    return InputError(message(_WHAT, got, _HINT))


def from_dict(data: Any) -> Shown:
    """The report, or the demo's result, that ``to_dict()`` wrote as ``data``.

    Whatever the data are: nothing is run or imported by name, and what can be read can be shown.

    Raises:
        InputError: if ``data`` are no such result.
    """
    if not isinstance(data, dict):
        raise _refused(f"a {type(data).__name__} in the place of a result")
    title = data.get("title")
    for module in MODULES:
        import_module(module)
    kinds = {kind.title: kind for kind in _kinds()}
    if title != "demo" and not (isinstance(title, str) and title in kinds):
        known = ", ".join(sorted([*kinds, "demo"]))
        raise _refused(f"the title {str(title)[:60]!r}, none of {known}")
    try:
        shown: Shown = DemoView(data) if title == "demo" else kinds[title].from_dict(data)
        # Laid out once to see that it can be: types are checked where they are used.
        _exercise(shown)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as e:
        raise _refused(f"a {title!r} that does not hold together ({type(e).__name__}: {e})") from e
    return shown


def _exercise(shown: Shown) -> None:
    from normwise.pages import Page
    from normwise.pages.charts import drawing
    from normwise.pages.render import fragment

    sections = shown.sections()
    fragment(Page("", sections))
    for section in sections:
        for chart in section.charts:
            drawing(chart)


def load(path: str | os.PathLike[str]) -> list[Shown]:
    """The results of a JSON file: one, or a list of them.

    Raises:
        InputError: if the file cannot be read, has more than 64 MB, or holds something else.
    """
    name = repr(os.fspath(path))
    try:
        with Path(path).open("rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise _refused(f"{name} ({error.strerror or error})") from error
    if len(raw) > LARGEST:
        raise _refused(f"{name} with more than {LARGEST // 2**20} MB")
    try:
        # JSON has no NaN; Python's would read one.
        data = json.loads(raw, parse_constant=lambda _: None)
    except (RecursionError, ValueError) as error:
        raise _refused(f"{name} ({type(error).__name__}: {str(error)[:200]})") from error
    return [from_dict(one) for one in (data if isinstance(data, list) else [data])]
