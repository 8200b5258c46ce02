"""Charts of what was recorded step by step: percentiles and curves, one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from normwise.pages.parts import Axis, Chart

__all__ = ["curves", "percentiles"]

STEP = Axis("step", "training step", format="~d")


def percentiles(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    description: str,
    keys: Sequence[str],
    labels: Sequence[str] = (),
) -> Chart:
    """A line of the middle one of ``keys`` in a band from the first to the last.

    rows: ``step``, ``name`` (the layer) and the keys. An even number of keys has the upper of the
    two middle ones as its line.
    """
    labels = labels or keys
    low, middle, high = 0, len(keys) // 2, len(keys) - 1
    kept = [
        {
            "step": row["step"],
            "name": row["name"],
            labels[low]: row[keys[low]],
            labels[middle]: row[keys[middle]],
            labels[high]: row[keys[high]],
        }
        for row in rows
    ]
    return Chart(
        "line",
        title,
        description,
        kept,
        x=STEP,
        y=Axis(labels[middle], labels[middle]),
        layer="name",
        band=(labels[low], labels[high]),
        choose=True,
    )


def curves(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    description: str,
    keys: Mapping[str, str],
    *,
    label: str,
    log: bool = False,
) -> Chart:
    """A line for each of ``keys``, key to what it is called.

    rows: ``step``, ``name`` (the layer) and the keys; None where there is no value.
    """
    kept = [
        {"step": row["step"], "name": row["name"], "value": row[key], "what": name}
        for row in rows
        for key, name in keys.items()
        if row.get(key) is not None
    ]
    return Chart(
        "line",
        title,
        description,
        kept,
        x=STEP,
        y=Axis("value", label, log=log),
        color=Axis("what", "what", "category"),
        layer="name",
        choose=True,
    )
