"""The rules' documentation as files, from the docstrings: ``python -m normwise.doctor.pages docs``.

Writes ``docs/rules/nw101.md`` and so on, and the table of rules in ``docs/doctor.md``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from normwise.doctor.rule import NEEDS, Rule, all_rules
from normwise.files import write_atomically

__all__ = ["files", "table"]

BEGIN, END = "<!-- rules: written by python -m normwise.doctor.pages docs -->", "<!-- end -->"
_FAMILIES = {
    "NW1": "Parameters, buffers and attributes",
    "NW2": "Structure",
    "NW3": "Data",
}


def _finds(rule: Rule) -> str:
    """The first sentence of the page, without words in brackets (formulas stay)."""
    text = rule.page().partition("## What it finds")[2].partition("##")[0]
    sentence = " ".join(text.split()).partition(". ")[0]
    return re.sub(r" \([^()]*[a-z]{4}[^()]*\)", "", sentence).rstrip(".") + "."


def _needs(rule: Rule) -> str:
    return "" if rule.needs == "state" else NEEDS[rule.needs].partition(":")[0]


def table() -> str:
    """The rules by family, in Markdown, each with a link to its page."""
    lines: list[str] = []
    for family, title in _FAMILIES.items():
        lines += [f"### {family}xx {title}", "", "| | rule | severity | needs | finds |",
                  "|---|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| [{r.code}](rules/{r.code.lower()}.md) | {r.name} | {r.severity} | {_needs(r)} | "
            f"{_finds(r)} |"
            for r in all_rules()
            if r.code.startswith(family)
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


def files(docs: Path) -> Mapping[Path, str]:
    """What the files under ``docs`` hold when they are up to date."""
    pages = {docs / "rules" / f"{r.code.lower()}.md": r.page() + "\n" for r in all_rules()}
    overview = docs / "doctor.md"
    before, _, rest = overview.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return {**pages, overview: f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"}


def main(docs: str) -> None:
    wanted = files(Path(docs))
    (Path(docs) / "rules").mkdir(exist_ok=True)
    for path, text in wanted.items():
        data = text.encode()
        write_atomically(path, lambda file, data=data: file.write(data))  # type: ignore[misc] # bound now
    for path in (Path(docs) / "rules").glob("*.md"):
        if path not in wanted:
            path.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
