"""``normwise explain``: what people ask about batch norm, answered with numbers."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .output import console, print_json, trimmed

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from ..explain import Topic

__all__ = ["register"]


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``explain`` to the command line."""
    parser = subparsers.add_parser(
        "explain",
        help="answer a question about batch norm, with numbers from the library",
        description="Shows a page on a topic: a short answer, numbers, what to do, sources. "
        "Without a topic it lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  normwise explain                    the topics
  normwise explain momentum           one of them
  normwise explain gamma              any word about one will do
  normwise explain softmax --run      with the numbers computed here and now
  normwise explain NW101              a rule of normwise check

Exit codes: 0 fine, 1 with --run: an example printed something else than the page says,
2 no such topic.""",
    )
    parser.add_argument("topic", nargs="*", metavar="TOPIC", help="a topic, or words about one")
    parser.add_argument("--run", dest="again", action="store_true", help="run the page's examples")
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else")
    parser.set_defaults(run=run)


def _list(as_json: bool) -> int:
    from ..explain import topics

    found = topics().values()
    if as_json:
        print_json([{"id": t.id, "title": t.title, "keywords": t.keywords} for t in found])
        return 0
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for topic in found:
        table.add_row(topic.id, topic.title)
    screen = console()
    trimmed(screen, table)
    screen.print("normwise explain TOPIC shows one; any word about it will do.", highlight=False)
    return 0


def _show(topic: Topic) -> None:
    from rich.markdown import Markdown

    screen = console()
    # Where an address cannot hide behind its words, it is written out.
    links = screen.is_terminal
    trimmed(screen, Markdown(topic.for_terminal(), code_theme="ansi_dark", hyperlinks=links))


def _rule(word: str) -> Topic | None:
    """The page of the doctor's rule of this code or name."""
    from ..doctor import all_rules
    from ..explain import Topic

    for rule in all_rules():
        if word.casefold() in (rule.code.casefold(), rule.name):
            return Topic(rule.code, f"{rule.code} {rule.name}", (rule.name,), rule.page())
    return None


def run(arguments: argparse.Namespace) -> int:
    """Shows the page or the list, and returns the exit code."""
    if not arguments.topic:
        return _list(arguments.json)
    from dataclasses import replace

    from ..explain import find
    from ..explain import run as run_examples

    words = " ".join(arguments.topic)
    topic = _rule(words) or find(words)
    changed: tuple[str, ...] = ()
    if arguments.again:
        ran = run_examples(topic)
        topic, changed = replace(topic, text=ran.text), ran.changed
    if arguments.json:
        page = {"id": topic.id, "title": topic.title, "keywords": topic.keywords}
        print_json({**page, "markdown": topic.text, "changed": changed})
    else:
        _show(topic)
    return 1 if changed else 0
