"""Writing a file in one piece: a temporary name beside it, then a rename."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from normwise.errors import OutputError, message

__all__ = ["write_atomically"]


def write_atomically(
    path: str | os.PathLike[str],
    write: Callable[[BinaryIO], object],
    hint: str = "a path in a directory that exists and takes files",
) -> None:
    """``path`` gets all that ``write`` writes or stays as it was: a new name, then a rename.

    Raises:
        OutputError: if the file cannot be written; ``hint`` says what to try.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        # Not tempfile: its files are for the owner alone, a picture is for whom umask says.
        with draft.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with no content
        os.replace(draft, target)
    except OSError as error:
        raise OutputError(
            message("an output must be writable", f"{os.fspath(path)!r} ({error})", hint)
        ) from error
    finally:
        draft.unlink(missing_ok=True)
