"""The doctor: named rules over the norms of a model or a checkpoint."""

from normwise.doctor.config import Config
from normwise.doctor.finding import Finding, Repair
from normwise.doctor.main import check
from normwise.doctor.repairing import RepairReport, repair
from normwise.doctor.report import CheckReport
from normwise.doctor.rule import Rule, all_rules, rule

__all__ = [
    "CheckReport",
    "Config",
    "Finding",
    "Repair",
    "RepairReport",
    "Rule",
    "all_rules",
    "check",
    "repair",
    "rule",
]
