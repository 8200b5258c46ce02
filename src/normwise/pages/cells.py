"""One value in a table: what is read, and what it is sorted by."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

__all__ = ["Cell", "cell", "finite", "is_number", "shown", "visible"]

_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def finite(value: Any) -> float | None:
    """``value`` as a number that can be drawn, or None."""
    try:
        return float(value) if is_number(value) and math.isfinite(value) else None
    except OverflowError:  # an int of 400 digits
        return None


def visible(text: str) -> str:
    """``text`` with what cannot be seen, and changes what can, spelled out.

    Control characters, marks that turn the direction of writing, halves of surrogate pairs: names
    come from files of strangers.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(value: Any) -> str:
    """``value`` as it is read: numbers to three digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} = {shown(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    return visible(str(value))


@dataclass(frozen=True)
class Cell:
    """``key`` is the number that the column is sorted by, where the text is not what to sort by."""

    text: str
    key: str | None = None


def cell(value: Any) -> Cell:
    """Numbers sort by all their digits; a pair (before, after) by the latter."""
    last = value[-1] if isinstance(value, (list, tuple)) and value else value
    if is_number(last):
        try:
            key = float(last)
        except OverflowError:
            key = math.inf if last > 0 else -math.inf
        # NaN is no place in an order: like nothing, it goes last.
        return Cell(shown(value), None if math.isnan(key) else repr(key))
    return Cell(shown(value))
