"""The pages that ``make docs`` builds: all of them can be reached."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_the_navigation_names_every_page_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r": +([\w/-]+\.md)$", text.partition("\nnav:\n")[2], re.MULTILINE)
    # rglob("*.md") does not follow links, and docs/explain is one.
    pages = [*DOCS.glob("*.md"), *DOCS.glob("*/*.md")]
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in pages)


def test_the_site_is_no_part_of_the_repository() -> None:
    site = re.search(r"^site_dir: (\w+)/", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert site is not None
    assert f"{site[1]}/" in (ROOT / ".gitignore").read_text().splitlines()
