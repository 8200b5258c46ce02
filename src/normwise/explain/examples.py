"""A topic's examples, run again."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from dataclasses import dataclass
from typing import Any

from normwise.explain.library import Topic

__all__ = ["Ran", "run"]

_BLOCK = re.compile(r"(^```pycon\n)(.*?)(^```$)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Ran:
    """text: the page with what the examples print here. changed: statements that print something
    else than the page says. names: what the examples left, by name."""

    text: str
    changed: tuple[str, ...]
    names: dict[str, Any]


def _execute(source: str, names: dict[str, Any]) -> str:
    """What a statement prints; an error ends the run, as it would for a reader."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, "<example>", "single"), names)
    return out.getvalue()


def run(topic: Topic) -> Ran:
    """Run the examples of ``topic`` in a namespace of their own; torch's random state is kept.

    Returns:
        Ran: the page with the numbers of this machine.

    Example:
        >>> from normwise import explain
        >>> ran = explain.run(explain.find("softmax"))
        >>> ran.changed
        ()
        >>> abs(round(ran.names["y"].sum().item(), 4))
        0.0
    """
    import torch

    names: dict[str, Any] = {"__name__": "__main__"}
    changed: list[str] = []
    checker = doctest.OutputChecker()

    def block(match: re.Match[str]) -> str:
        lines = []
        for example in doctest.DocTestParser().get_examples(match[2]):
            first, *rest = example.source.rstrip("\n").split("\n")
            lines += [f">>> {first}", *(f"... {line}".rstrip() for line in rest)]
            got = _execute(example.source, names)
            if not checker.check_output(example.want, got, 0):
                changed.append(example.source.rstrip("\n"))
            lines += got.splitlines()
        return match[1] + "\n".join(lines) + "\n" + match[3]

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        text = _BLOCK.sub(block, topic.text)
    return Ran(text, tuple(changed), names)
