"""A user's figure (loss, accuracy) of each batch, averaged over the data by batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from normwise.tools.recalibrate.feed import batch_size

__all__ = ["Average", "Metric"]

Metric = Callable[[Any, Any], Any]
"""``metric(output, batch)``: the batch's mean, one number or a mapping of named ones."""


class Average:
    """Sums by name, and the weight that they came with."""

    def __init__(self, sums: Mapping[str, float] | None = None, weight: int = 0) -> None:
        self.sums: dict[str, float] = dict(sums or {})
        self.weight = weight

    def add(self, value: Any, batch: Any) -> None:
        named = value if isinstance(value, Mapping) else {"metric": value}
        weight = batch_size(batch)
        self.weight += weight
        for name, number in named.items():
            self.sums[str(name)] = self.sums.get(str(name), 0.0) + weight * float(number)

    def merge(self, other: Average) -> None:
        self.weight += other.weight
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total

    def values(self) -> dict[str, float]:
        return {name: total / max(self.weight, 1) for name, total in self.sums.items()}
