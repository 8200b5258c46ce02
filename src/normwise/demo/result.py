"""What a run of the demo found, as data: the table, the picture and the JSON are views of it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..pages import Section
from ..report.demo import DemoView
from .network import NORMWISE, PLAIN, TORCH
from .settings import Settings
from .train import PERCENTILES, History
from .verify import Agreement, compare

if TYPE_CHECKING:
    from .aftercare import Aftercare

__all__ = ["DemoResult", "NetworkResult", "summarize"]


@dataclass(frozen=True)
class NetworkResult:
    """One of the three networks. Curves have one value for each entry of ``looks``."""

    steps_to_90: int | None
    """The first look with at least 90 % of the test images right; None if there was none."""
    steps_to_95: int | None
    final_accuracy: float
    step_ms: float
    """Median wall time of a training step, in milliseconds."""
    drift: float
    """How far a sigmoid's median input moved in training (highest less lowest look, the start
    left out): the median over the units of the last hidden layer."""
    looks: list[int] = field(repr=False)
    """Training steps after which the test images were shown; the first is 0."""
    accuracies: list[float] = field(repr=False)
    test_losses: list[float] = field(repr=False)
    sigmoid_inputs: dict[int, list[float]] = field(repr=False)
    """Percentile (15, 50, 85) to its curve: the input of the typical unit, over the test images."""


@dataclass(frozen=True)
class DemoResult:
    """The three networks by the batch norm that they have: 'none', 'torch.nn', 'normwise'."""

    seed: int
    quick: bool
    settings: Settings
    networks: dict[str, NetworkResult]
    agreement: Agreement
    """Between the two batch norms."""
    typical_unit: int
    """The unit of the last hidden layer in ``sigmoid_inputs``, counted from 0."""
    seconds: float
    """Wall time of the training."""
    picture: Path | None
    """The PNG, or None if none was asked for."""
    page: Path | None = None
    """The HTML page, or None if none was asked for."""
    aftercare: Aftercare | None = field(default=None, repr=False)
    """What check, recalibrate and fold made of the network with normwise's batch norm, if a page
    was asked for."""

    @property
    def passed(self) -> bool:
        """True if the two batch norms agree."""
        return self.agreement.passed

    @property
    def step_time_ratio(self) -> float:
        """normwise's median step time over torch.nn's: whole training steps, not layers alone."""
        return self.networks[NORMWISE].step_ms / self.networks[TORCH].step_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for ``json.dumps``; NaN becomes None."""
        plain = asdict(replace(self, aftercare=None))
        plain["title"] = "demo"
        for file in ("picture", "page"):
            path = getattr(self, file)
            plain[file] = None if path is None else str(path)
        plain["aftercare"] = None if self.aftercare is None else self.aftercare.to_dict()
        plain["agreement"]["passed"] = self.passed
        plain["step_time_ratio"] = self.step_time_ratio
        cleaned: dict[str, Any] = _plain(plain)
        return cleaned

    def sections(self) -> list[Section]:
        """What stands on its page."""
        return DemoView(self.to_dict()).sections()

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write it as one page that needs nothing else (docs/report.md), in one piece.

        Raises:
            OutputError: if ``path`` cannot be written to.
        """
        DemoView(self.to_dict()).page().save(path)


def _plain(value: Any) -> Any:
    """``value`` as JSON can say it: string keys, and null for what is not a finite number."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _first(looks: Sequence[int], accuracies: Sequence[float], goal: float) -> int | None:
    return next((step for step, got in zip(looks, accuracies, strict=True) if got >= goal), None)


def _drifts(history: History) -> NDArray[np.float32]:
    """(units,): the range of each unit's median input. The start is not yet training."""
    medians = np.stack([q[PERCENTILES.index(50)] for q in history.sigmoid_inputs[1:]])
    ranges: NDArray[np.float32] = np.ptp(medians, axis=0)
    return ranges


def _typical_unit(drifts: Sequence[NDArray[np.float32]]) -> int:
    """The unit whose drift ranks nearest the middle in every one of the networks.

    The paper shows "one typical sigmoid" and does not say how it was picked; this rule leaves
    nothing to pick.
    """
    ranks = [np.argsort(np.argsort(drift, kind="stable"), kind="stable") for drift in drifts]
    middle = (len(drifts[0]) - 1) / 2
    return int(np.argmin(np.sum([np.abs(rank - middle) for rank in ranks], axis=0)))


def summarize(
    histories: Mapping[str, History],
    *,
    seed: int,
    quick: bool,
    settings: Settings,
    seconds: float,
    picture: Path | None,
) -> DemoResult:
    """The result of a training."""
    drifts = {name: _drifts(history) for name, history in histories.items()}
    unit = _typical_unit([drifts[PLAIN], drifts[NORMWISE]])
    networks = {
        name: NetworkResult(
            steps_to_90=_first(history.looks, history.accuracies, 0.90),
            steps_to_95=_first(history.looks, history.accuracies, 0.95),
            final_accuracy=history.accuracies[-1],
            step_ms=1e3 * median(history.step_seconds),
            drift=float(np.median(drifts[name])),
            looks=history.looks,
            accuracies=history.accuracies,
            test_losses=history.test_losses,
            sigmoid_inputs={
                q: [float(look[row, unit]) for look in history.sigmoid_inputs]
                for row, q in enumerate(PERCENTILES)
            },
        )
        for name, history in histories.items()
    }
    return DemoResult(
        seed=seed,
        quick=quick,
        settings=settings,
        networks=networks,
        agreement=compare(histories[TORCH], histories[NORMWISE]),
        typical_unit=unit,
        seconds=seconds,
        picture=picture,
    )
