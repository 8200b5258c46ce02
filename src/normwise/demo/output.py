"""The output directory: found usable before the training, written to in one piece after it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from ..errors import NormwiseError, message

__all__ = ["OutputError", "prepare", "write_atomically"]


class OutputError(NormwiseError, OSError):
    """An output directory that cannot be made or written to."""


def _refused(path: Path, error: OSError) -> OutputError:
    return OutputError(
        message(
            "the output directory must be one that can be written to",
            f"{os.fspath(path)!r} ({error.strerror or error})",
            "--out with another directory",
        )
    )


def prepare(out: str | os.PathLike[str]) -> Path:
    """``out`` as a directory that exists and takes files; ``OutputError`` if it cannot be that."""
    path = Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell of read-only or full file systems; a file does.
        with TemporaryFile(dir=path) as probe:
            probe.write(b"normwise")
    except OSError as error:
        raise _refused(path, error) from error
    return path


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """``path`` gets all that ``write`` writes or stays as it was: a new name, then a rename."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # Not tempfile: its files are for the owner alone, a picture is for whom umask says.
        with draft.open("wb") as file:
            write(file)
        os.replace(draft, path)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        draft.unlink(missing_ok=True)
