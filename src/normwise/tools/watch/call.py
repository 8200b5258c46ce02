"""One call of one norm, from the tensors that it met to a row of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from normwise.tools.watch.measure import GAPS, bring, percentiles

__all__ = ["GRADIENTS", "SPREADS", "Call", "columns", "rows"]

SPREADS = ("input", "output", "gamma", "beta")
"""What percentiles are taken of."""

GRADIENTS = ("gamma_grad", "beta_grad", "input_grad")

_FIXED = ("step", "mode", "name", "call", "kind", "training", "values", "nonfinite")


def _labels(what: str, points: Sequence[float]) -> list[str]:
    return [f"{what}_p{p:g}" for p in points]


def columns(points: Sequence[float]) -> tuple[str, ...]:
    """The names in a row, in order; ``points`` are the percentiles."""
    spreads = (label for what in SPREADS for label in _labels(what, points))
    return (*_FIXED, *spreads, *GAPS, *GRADIENTS, "nonfinite_grads")


@dataclass
class Call:
    """fixed: what is known at once. tensors: what still lies on the device, by name; gradients come
    during the backward."""

    fixed: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    closed: bool = False


def rows(calls: Sequence[Call], points: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each call; None for what was not there. Closes the calls."""
    named = [(i, name, t) for i, call in enumerate(calls) for name, t in call.tensors.items()]
    empty = dict.fromkeys(columns(points))
    found: list[dict[str, Any]] = [{**empty, **call.fixed} for call in calls]
    samples, places = [], []
    for (i, name, _), values in zip(named, bring([t for _, _, t in named]), strict=True):
        if name in SPREADS:
            samples.append(values)
            places.append((found[i], name))
        elif name == "gaps":
            found[i].update(zip(GAPS, values.tolist(), strict=True))
        else:
            found[i][name] = values.tolist()[0]
    curves = percentiles(samples, np.asarray(points, dtype=np.float64))
    labels = {name: _labels(name, points) for name in SPREADS}
    for (row, name), curve in zip(places, curves, strict=True):
        if curve is not None:
            row.update(zip(labels[name], curve, strict=True))
    for call, row in zip(calls, found, strict=True):
        call.closed = True
        met = [row[g] for g in GRADIENTS if row[g] is not None]
        row["nonfinite_grads"] = sum(not math.isfinite(g) for g in met)
    return found
