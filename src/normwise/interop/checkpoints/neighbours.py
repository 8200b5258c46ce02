"""Files that a file names: only beside it or below, whatever links say."""

from __future__ import annotations

import os
import re
from pathlib import Path

from normwise.interop.checkpoints.file import refuse
from normwise.interop.checkpoints.limits import NAME, shown

__all__ = ["neighbour"]


def neighbour(path: str, named: object) -> str:
    """The path of the file that the one at ``path`` calls ``named``.

    Where ``path`` is a link, its target's folder counts as its own, too: the cache of Hugging Face
    holds nothing but links into one folder of blobs.

    Raises:
        CheckpointError: if the name is none, or leads out of these folders.
    """
    plain = isinstance(named, str) and 0 < len(named) <= NAME and not re.search(r"[\\:\0]", named)
    parts = named.split("/") if plain and isinstance(named, str) else [".."]
    if parts[0] == "" or ".." in parts:
        refuse(path, f"a file that names {shown(named)}, not a file beside it", "a file that is "
               "whole, or names in it without folders")  # fmt: skip
    folder = os.path.dirname(path) or "."
    found = os.path.join(folder, *parts)
    homes = {os.path.realpath(folder), os.path.dirname(os.path.realpath(path))}
    if not any(Path(os.path.realpath(found)).is_relative_to(home) for home in homes):
        refuse(
            path, f"{shown(named)}, a link that leads out of its folder", "the file itself there"
        )
    return found
