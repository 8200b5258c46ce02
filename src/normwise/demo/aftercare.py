"""What one does with a trained network: check it, recalibrate it, fold it."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..doctor import CheckReport, check
from ..graph import FoldReport, fold
from ..tools.recalibrate import RecalibrationReport, recalibrate
from .data import Digits

__all__ = ["Aftercare", "aftercare"]

LATENCY_SECONDS = 0.2
"""For the latency before and after the fold; the network takes a tenth of a millisecond."""


@dataclass(frozen=True)
class Aftercare:
    """The reports of the three tools, in the order in which they ran."""

    check: CheckReport
    recalibration: RecalibrationReport
    fold: FoldReport
    accuracies: dict[str, float]
    """Share of the test images classified right: 'trained', 'recalibrated', 'folded'."""
    seconds: float

    @property
    def passed(self) -> bool:
        """True if the check found nothing bad, and the recalibrated statistics are the data's."""
        bad = self.check.at_least("warning")
        return not bad and self.recalibration.facts["self_consistent"] is not False

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        reports = {"check": self.check, "recalibration": self.recalibration, "fold": self.fold}
        told = {name: report.to_dict() for name, report in reports.items()}
        return {**told, "accuracies": self.accuracies, "seconds": self.seconds}


@torch.no_grad()
def _accuracy(network: nn.Module, images: Tensor, classes: Tensor) -> float:
    right = network(images).argmax(dim=1) == classes
    return int(right.sum()) / len(classes)


def aftercare(network: nn.Module, digits: Digits, batch: int) -> Aftercare:
    """Checks ``network`` on the training images, recalibrates it on them, and folds it."""
    start = perf_counter()
    batches = list(digits.train_images.split(batch))
    trained = network.eval()
    found = check(trained, batches)
    recalibrated, statistics = recalibrate(trained, batches, progress=False)
    folded, where = fold(recalibrated, digits.test_images[:batch], seconds=LATENCY_SECONDS)
    models = {"trained": trained, "recalibrated": recalibrated, "folded": folded}
    accuracies = {
        name: _accuracy(model, digits.test_images, digits.test_classes)
        for name, model in models.items()
    }
    return Aftercare(found, statistics, where, accuracies, perf_counter() - start)
