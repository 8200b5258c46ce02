"""The output directory: found usable before the training."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

from ..errors import OutputError, message

__all__ = ["HINT", "PAGE_HINT", "prepare"]

HINT = "--out with another directory"
PAGE_HINT = "--html with a file in another directory"


def prepare(out: str | os.PathLike[str], hint: str = HINT) -> Path:
    """``out`` as a directory that exists and takes files; ``OutputError`` if it cannot be that."""
    path = Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell of read-only or full file systems; a file does.
        with TemporaryFile(dir=path) as probe:
            probe.write(b"normwise")
    except OSError as error:
        raise OutputError(
            message(
                "the output directory must be one that can be written to",
                f"{os.fspath(path)!r} ({error.strerror or error})",
                hint,
            )
        ) from error
    return path
