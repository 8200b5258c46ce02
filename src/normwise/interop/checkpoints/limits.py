"""How much a file may make its reader hold, and the checks that ask for it.

A file says how long it is, not how much memory reading it takes: a byte of a pickle makes an object
of 64, three bytes of JSON one of 56. So what is parsed is bounded before it is parsed. The bounds
leave room for 60,000 tensors in a file, four times as many as any checkpoint that we know of holds
in one, and keep what a hostile file can take under 300 MB.
"""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["is_size", "numel", "parse_json", "shown"]

MB = 2**20
# The text that describes tensors: a safetensors header, a shard index, a pickle, the directory of
# an archive. 110 to 250 bytes a tensor in each of them.
DESCRIPTION = 16 * MB
DIRECTORY = 8 * MB  # of an archive: an entry of 47 bytes or more becomes an object of 600
# JSON: objects and arrays; all else takes at most 12 times the bytes that it is written in.
BRACKETS = 400_000
# Pickle: a tensor takes 40 steps and 6 containers.
STEPS, CONTAINERS = 2_500_000, 400_000
FIELDS = 600_000  # of protocol buffers: five a tensor, ten a node
TENSORS = 200_000
NAME, RANK, DEPTH = 512, 64, 32
SHARDS = 4096
# All norms of a model together: vectors. The largest open language models have 10 MB of them.
NORMS = 64 * MB
# A view that repeats what is stored (expand) may not claim more than this, or than it stores.
EXPANDED = 16 * MB


def shown(value: object, length: int = 80) -> str:
    """A piece of a file in a message: its repr, which escapes what a terminal would obey, cut."""
    if isinstance(value, (str, bytes)):
        return repr(value[:length]) + ("…" if len(value) > length else "")
    return (
        repr(value)[:length]
        if value is None or isinstance(value, (int, float))
        else (type(value).__name__)
    )


def is_size(value: object) -> bool:
    """Whether ``value`` can be a size, a stride or an offset. True is an int to Python."""
    return type(value) is int and 0 <= value < 2**63


def numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key that stands twice")
    return content


def parse_json(text: bytes | bytearray) -> dict[str, Any]:
    """A JSON object of bounded memory.

    Raises:
        ValueError: if it is something else, too large, or has a key twice.
    """
    if len(text) > DESCRIPTION or text.count(b"{") + text.count(b"[") > BRACKETS:
        raise ValueError(f"{len(text)} bytes of JSON, more than a description of tensors takes")
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("JSON nested without end") from None
    if not isinstance(content, dict):
        raise ValueError(f"JSON that is a {type(content).__name__}, not an object")
    return content
