"""The form of a rule, and the register of all of them: one file a rule under ``rules/``."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar

from normwise.doctor.finding import Finding, Repair
from normwise.errors import InputError, message

if TYPE_CHECKING:
    from normwise.doctor.subject import Subject

__all__ = ["NEEDS", "Rule", "all_rules", "rule"]

NEEDS = {
    "state": "parameters and buffers: a checkpoint is enough",
    "model": "the modules: pass the model",
    "graph": "a run of the model on an example: pass data or example_inputs=",
    "data": "data to run the model on: pass data=",
    "optimizer": "the optimizer: pass optimizer=",
    "peers": "other checkpoints of the same model: pass peers=",
}


class Rule(ABC):
    """A pattern that is bad in a norm; the class docstring is the rule's documentation page.

    code: ``NW1xx`` looks at parameters, buffers and attributes, ``NW2xx`` at the graph of the
    model, ``NW3xx`` runs data through it. name: the pattern. severity, confidence: of a finding
    unless it says otherwise. needs: one of :data:`NEEDS`; a rule that lacks it is skipped, and the
    report says so.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    severity: ClassVar[str]
    confidence: ClassVar[str] = "high"
    needs: ClassVar[str] = "state"

    @abstractmethod
    def check(self, subject: Subject) -> Iterator[Finding]:
        """The findings in ``subject``, which it never changes."""

    def finding(
        self,
        layer: str,
        fact: str,
        remedy: str,
        *,
        repair: Repair | None = None,
        severity: str | None = None,
        confidence: str | None = None,
        **evidence: Any,
    ) -> Finding:
        """A finding of this rule."""
        return Finding(
            self.code,
            self.name,
            layer,
            severity or self.severity,
            confidence or self.confidence,
            fact,
            remedy,
            evidence,
            repair,
        )

    @classmethod
    def page(cls) -> str:
        """The documentation page, in Markdown."""
        head = f"# {cls.code} {cls.name}\n\n*{cls.severity}; needs {NEEDS[cls.needs]}*\n\n"
        return head + inspect.cleandoc(cls.__doc__ or "")


@cache
def all_rules() -> tuple[Rule, ...]:
    """Every rule, by code."""
    from normwise.doctor import rules as package

    found: list[Rule] = []
    for entry in iter_modules(package.__path__, f"{package.__name__}."):
        module = import_module(entry.name)
        found += [
            kind()
            for kind in vars(module).values()
            if isinstance(kind, type) and issubclass(kind, Rule) and kind is not Rule
            and kind.__module__ == module.__name__
        ]  # fmt: skip
    return tuple(sorted(found, key=lambda r: r.code))


def rule(which: str) -> Rule:
    """The rule with this code or name.

    Raises:
        InputError: if there is none.
    """
    for one in all_rules():
        if which in (one.code, one.name):
            return one
    raise InputError(
        message(
            "a rule is named by its code or its name",
            repr(which),
            "NW101, or normwise.doctor.all_rules()",
        )
    )
