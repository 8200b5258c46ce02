"""The bytes of a file, read where asked, and the errors that name the file.

Reads are positioned (``pread``), not a memory map: a file that shrinks while it is mapped kills the
process, and pages of a map count as the process's own memory. Every read is held against what the
file has before memory is asked for.
"""

from __future__ import annotations

import os
import stat
from io import BytesIO
from pathlib import Path
from typing import NoReturn

from normwise.errors import CheckpointError, message
from normwise.interop.checkpoints.limits import MB

__all__ = ["Region", "Stream", "open_file", "refuse"]

INTACT = "an intact copy of the file"


def refuse(path: str, got: str, hint: str, invariant: str = "") -> NoReturn:
    raise CheckpointError(
        message(invariant or f"{path!r} must be a checkpoint that can be read safely", got, hint)
    )


class _Descriptor:
    """An open file; -1 once closed, so that a late read fails and cannot reach another file."""

    def __init__(self, path: str, number: int) -> None:
        self.path, self.number = path, number

    def close(self) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    __del__ = close


class Region:
    """``size`` bytes of a file from ``start``: the file itself, or what an archive holds."""

    def __init__(self, descriptor: _Descriptor, start: int, size: int) -> None:
        self._descriptor, self.start, self.size = descriptor, start, size

    @property
    def path(self) -> str:
        return self._descriptor.path

    def refuse(self, got: str, hint: str = INTACT, invariant: str = "") -> NoReturn:
        refuse(self.path, f"{got}, in {self.path!r}" if invariant else got, hint, invariant)

    def part(self, offset: int, size: int, what: str) -> Region:
        """The ``size`` bytes from ``offset``, which ``what`` names in the error."""
        if offset < 0 or size < 0 or offset + size > self.size:
            self.refuse(
                f"{what} of {size} bytes at {offset}, past the end of the {self.size} that are "
                "there: it was cut short or damaged"
            )
        return Region(self._descriptor, self.start + offset, size)

    def read(self, offset: int = 0, size: int | None = None, what: str = "a piece") -> bytearray:
        """These bytes, all of them. Without ``size`` up to the end."""
        wanted = self.part(offset, self.size - offset if size is None else size, what)
        data = bytearray(wanted.size)
        view, done = memoryview(data), 0
        while done < wanted.size:  # the kernel reads at most 2 GB at once
            try:
                n = os.preadv(self._descriptor.number, [view[done:]], wanted.start + done)
            except OSError as error:
                got = "a checkpoint that was closed" if self._descriptor.number < 0 else str(error)
                self.refuse(got, "reading inside `with open_checkpoint(path) as checkpoint:`")
            if n == 0:
                self.refuse("a file that became shorter while it was read")
            done += n
        return data

    def close(self) -> None:
        self._descriptor.close()


class Stream(BytesIO):
    """A buffer whose lines end: one of 30 MB would be a number of 30 million digits."""

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(4096 if size is None or size < 0 else min(size, 4096))


class Window:
    """What ``zipfile`` reads an archive through: reads are clamped to ``most`` bytes."""

    def __init__(self, region: Region, most: int = MB) -> None:
        self._region, self._most, self._at = region, most, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._region.size}[whence]
        if base + offset < 0:
            raise OSError("a seek to before the start")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._region.size - self._at, 0)
        size = left if size < 0 else min(size, left)
        if size > self._most:
            self._region.refuse(
                f"an archive whose directory has {size} bytes, more than one of tensors takes"
            )
        data = self._region.read(self._at, size)
        self._at += size
        return bytes(data)


def open_file(path: str | os.PathLike[str]) -> Region:
    """A regular file, open for reading.

    Raises:
        CheckpointError: if there is none, or something else (a device could block or never end).
    """
    name = os.fspath(path)
    try:
        # A pipe would make open() wait for somebody to write into it, hence O_NONBLOCK.
        kind = stat.S_IFMT(os.stat(name).st_mode)
        if kind == stat.S_IFREG:
            number = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
            descriptor = _Descriptor(name, number)
            status = os.fstat(number)
            kind = stat.S_IFMT(status.st_mode)
    except FileNotFoundError:
        link = Path(name).is_symlink()
        refuse(name, "a link to nothing" if link else "no file", "the path of a file that exists")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        refuse(name, f"{type(error).__name__}: {error}", "a file that this user can read")
    if kind != stat.S_IFREG:
        what = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        refuse(name, what.get(kind, "a device"), "the path of a regular file")
    if status.st_size == 0:
        refuse(name, "an empty file", "writing it again: it was opened for writing and not written")
    return Region(descriptor, 0, status.st_size)
