"""The topics: their files, and which of them a word means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files

from normwise.errors import InputError, message

__all__ = ["Topic", "find", "topics"]

ORDER = (
    "sum",
    "scale",
    "axes",
    "num-features",
    "momentum",
    "train-eval",
    "state-dict",
    "flags",
    "small-batches",
    "which-norm",
    "order",
)
"""As one would read them; each is ``topics/<id>.md``."""

_HEAD = re.compile(r"---\nkeywords: (.*)\n---\n# (.*)\n")
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Topic:
    """One question and its answer.

    id: what ``normwise explain`` takes. title: the question. keywords: other words that mean it.
    text: the page, Markdown, title and all.
    """

    id: str
    title: str
    keywords: tuple[str, ...]
    text: str

    def for_terminal(self) -> str:
        """The text with links that a terminal can follow: commands, names of pages, addresses."""

        def link(match: re.Match[str]) -> str:
            words, target = match[1], match[2]
            if target.startswith("https:"):
                return match[0]
            if target.startswith("../"):
                return f"`{words}`"
            return f"`normwise explain {target.removesuffix('.md')}`"

        return _LINK.sub(link, self.text)


@lru_cache(maxsize=1)
def topics() -> dict[str, Topic]:
    """All topics by id, in the order in which one would read them."""
    folder = files("normwise.explain") / "topics"
    found = {}
    for id_ in ORDER:
        page = (folder / f"{id_}.md").read_text(encoding="utf-8")
        head = _HEAD.match(page)
        assert head is not None, id_
        keywords = tuple(word.strip() for word in head[1].split(","))
        found[id_] = Topic(id_, head[2], keywords, f"# {head[2]}\n{page[head.end() :]}")
    return found


def _plain(word: str) -> str:
    """Without what people write in different ways: ``'Num_Features'`` is ``'num features'``."""
    return " ".join(re.sub(r"[_\-/.,?!'\"()]+", " ", word.casefold()).split())


def _score(topic: Topic, words: list[str]) -> int:
    """How often the topic speaks of the words; 0 unless it speaks of all of them."""
    text = _plain(f"{topic.id} {' '.join(topic.keywords)} {topic.title} {topic.text}")
    counts = [len(re.findall(rf"\b{re.escape(word)}\b", text)) for word in words]
    return sum(counts) if all(counts) else 0


def find(word: str) -> Topic:
    """The topic that ``word`` (an id, a keyword, or words of a title) means.

    Raises:
        InputError: if there is none; it names the nearest ones.
    """
    asked = _plain(word)
    names = {_plain(t.id): t for t in topics().values()}
    keywords = {_plain(k): t for t in topics().values() for k in (*t.keywords, t.title)}
    for known in (names, keywords):
        if asked in known:
            return known[asked]
    within = {
        t.id: t for k, t in keywords.items() if asked and re.search(rf"\b{re.escape(asked)}\b", k)
    }
    if len(within) == 1:
        return next(iter(within.values()))
    near = [*within]
    everything = {**keywords, **names}
    near += [everything[k].id for k in get_close_matches(asked, everything, n=3, cutoff=0.6)]
    if not near and asked:
        scores = {t.id: _score(t, asked.split()) for t in topics().values()}
        near = sorted((i for i in scores if scores[i]), key=lambda i: -scores[i])
    near = list(dict.fromkeys(near))[:3]
    raise InputError(
        message(
            f"a topic is one of {', '.join(topics())}, or a word about one",
            repr(word),
            " or ".join(f"normwise explain {i}" for i in near) or "normwise explain, for the list",
        )
    )
