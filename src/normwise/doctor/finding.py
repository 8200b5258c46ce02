"""What a rule says: a fact about one layer, its evidence in figures, and the advice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from normwise.results import plain

__all__ = ["CONFIDENCES", "SEVERITIES", "Finding", "Repair"]

SEVERITIES = ("info", "warning", "error")
"""From the mildest on. error: the layer is wrong; warning: it will hurt, or probably has;
info: true, and worth knowing before the next step."""
CONFIDENCES = ("low", "medium", "high")


@dataclass(frozen=True)
class Repair:
    """An edit that takes a finding away, as data: it serves a module and a checkpoint alike.

    safe: the model computes the same on every input on which it computed anything sensible, in
    eval mode and in training. does: the edit in words. tensors: new values, by the norm's own
    names (``'running_var'``). attributes: new attributes of the module (``'momentum'``).
    recalibrate: the statistics have to be taken anew, which needs the data.
    """

    safe: bool
    does: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    recalibrate: bool = False


@dataclass(frozen=True)
class Finding:
    """One finding.

    code, rule: ``'NW101'`` and ``'non-finite-buffer'``; :func:`normwise.doctor.rule` has the rule's
    page. layer: the qualified name of the layer, '' for the model. severity: one of
    :data:`SEVERITIES`. confidence: one of :data:`CONFIDENCES`: how sure it is that the fact is a
    fault. message: the fact. remedy: the advice. evidence: the figures, by name. repair: the edit
    that takes the finding away, if there is one.
    """

    code: str
    rule: str
    layer: str
    severity: str
    confidence: str
    message: str
    remedy: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    repair: Repair | None = field(default=None, repr=False, compare=False)

    @property
    def fix(self) -> str | None:
        """'safe', 'unsafe', or None where there is no edit that takes the finding away."""
        return None if self.repair is None else "safe" if self.repair.safe else "unsafe"

    @property
    def rank(self) -> int:
        """Of the severity: 0 for info, 2 for error."""
        return SEVERITIES.index(self.severity)

    def to_dict(self) -> dict[str, Any]:
        """All but the edit itself, as JSON knows it."""
        return {
            "code": self.code,
            "rule": self.rule,
            "layer": self.layer,
            "severity": self.severity,
            "confidence": self.confidence,
            "message": self.message,
            "remedy": self.remedy,
            "evidence": plain(self.evidence),
            "fix": self.fix,
            "does": None if self.repair is None else self.repair.does,
        }

    def __str__(self) -> str:
        where = self.layer or "the model"
        return f"{where}: {self.code} {self.rule} ({self.severity}): {self.message}"
