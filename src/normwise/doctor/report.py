"""What :func:`normwise.check` found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from normwise.doctor.finding import SEVERITIES, Finding, Repair
from normwise.pages import Axis, Chart, Column, Table
from normwise.results import Entry, Report, plain

__all__ = ["CheckReport"]


class CheckReport(Report):
    """The findings, worst first, and what was looked at.

    Attributes:
        findings: the :class:`Finding` s. ``entries`` has one a finding: ``name`` the layer,
            ``action`` the severity, ``reason`` the code and the rule.
        facts: ``source``; ``norms``, how many were looked at; ``rules``, the codes of those that
            ran; ``skipped``, code -> what the rule needs and was not given; ``errors``, code ->
            what stopped a rule or a run.
    """

    title: ClassVar[str] = "check"
    columns: ClassVar[tuple[str, ...]] = ("message", "remedy", "fix")

    def __init__(self, findings: Sequence[Finding], facts: Mapping[str, Any]) -> None:
        self.findings = tuple(findings)
        super().__init__(
            [
                Entry(
                    f.layer,
                    f.severity,
                    reason=f"{f.code} {f.rule}",
                    facts={"message": f.message, "remedy": f.remedy, "fix": f.fix},
                )
                for f in self.findings
            ],
            facts,
        )

    def at_least(self, severity: str) -> tuple[Finding, ...]:
        """The findings of this severity or worse."""
        return tuple(f for f in self.findings if f.rank >= SEVERITIES.index(severity))

    def summary(self) -> list[str]:
        counts = {s: sum(f.severity == s for f in self.findings) for s in reversed(SEVERITIES)}
        told = ", ".join(f"{n} {s}{'s' * (n > 1 and s != 'info')}" for s, n in counts.items() if n)
        norms = self.facts["norms"]
        of = f"{norms} norm{'s' * (norms != 1)} of {self.facts['source']}"
        lines = [f"{of}: {told or 'no findings'}"]
        skipped: dict[str, list[str]] = {}
        for code, need in self.facts.get("skipped", {}).items():
            skipped.setdefault(need, []).append(code)
        lines += [f"not run: {', '.join(codes)} ({need})" for need, codes in skipped.items()]
        lines += [f"stopped: {code}: {why}" for code, why in self.facts.get("errors", {}).items()]
        return lines

    def __str__(self) -> str:
        lines = []
        for f in self.findings:
            fix = {"safe": " [*]", "unsafe": " [unsafe fix]", None: ""}[f.fix]
            lines += [f"{f}{fix}", f"    {f.remedy}"]
        return "\n".join([*lines, *self.summary()])

    def to_dict(self) -> dict[str, Any]:
        found = [f.to_dict() for f in self.findings]
        return {"title": self.title, **plain(self.facts), "findings": found}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CheckReport:
        """What :meth:`to_dict` wrote; of a repair it knows what it does, not how."""
        findings = []
        for one in data["findings"]:
            own = {k: v for k, v in one.items() if k not in ("fix", "does")}
            fix = one.get("fix")
            repair = None if fix is None else Repair(fix == "safe", str(one.get("does")))
            findings.append(Finding(**own, repair=repair))
        return cls(findings, {k: v for k, v in data.items() if k not in ("title", "findings")})

    # The page

    def verdict(self) -> tuple[Literal["good", "bad"], str] | None:
        bad = len(self.at_least("warning"))
        if bad:
            return "bad", f"{bad} finding{'s' * (bad > 1)} to act on"
        return "good", "nothing to act on"

    def charts(self) -> list[Chart]:
        severity = Axis("severity", "severity", "severity")
        count = Axis("findings", "findings", format="~d")
        layers = Counter((f.layer or "(the model)", f.severity) for f in self.findings)
        rules = Counter((f"{f.code} {f.rule}", f.severity) for f in self.findings)
        return [
            Chart(
                "bar",
                "Findings by layer",
                "How many findings each layer has, by severity; worst layers first.",
                [{"layer": a, "severity": s, "findings": n} for (a, s), n in layers.items()],
                x=Axis("layer", "layer", "layer"),
                y=count,
                color=severity,
            ),
            Chart(
                "bar",
                "Findings by rule",
                "How often each rule found something.",
                [{"rule": a, "severity": s, "findings": n} for (a, s), n in rules.items()],
                x=Axis("rule", "rule", "category"),
                y=count,
                color=severity,
            ),
        ]

    def tables(self) -> list[Table]:
        columns = [
            Column("severity", "severity", "severity"),
            Column("layer", "layer", "layer"),
            Column("rule", "rule", "category"),
            Column("message", "what it is"),
            Column("remedy", "what to do"),
            Column("evidence", "evidence"),
            Column("confidence", "confidence"),
            Column("fix", "fix"),
        ]
        rows = [
            {
                "severity": f.severity,
                "layer": f.layer or "(the model)",
                "rule": f"{f.code} {f.rule}",
                "message": f.message,
                "remedy": f.remedy,
                "evidence": plain(f.evidence),
                "confidence": f.confidence,
                "fix": None if f.repair is None else f"{f.fix}: {f.repair.does}",
            }
            for f in self.findings
        ]
        return [Table("Findings", columns, rows)]
