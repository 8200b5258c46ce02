"""A zip archive whose entries are stored, not compressed: each is a piece of the file.

That is how torch writes: a tensor is read by seeking. A compressed entry is refused, so that no few
bytes become many.
"""

from __future__ import annotations

import zipfile
from typing import IO, cast

from normwise.errors import NormwiseError
from normwise.interop.checkpoints.file import Region, Window
from normwise.interop.checkpoints.limits import DIRECTORY, shown

__all__ = ["Archive"]

LOCAL = 30  # bytes of a local header, before the name and the extra field
ENCRYPTED = 1


class Archive:
    """The entries of a zip, by their name below the archive's own folder."""

    def __init__(self, file: Region) -> None:
        self.file = file
        window = cast("IO[bytes]", Window(file, DIRECTORY))
        try:
            with zipfile.ZipFile(window) as archive:
                entries = archive.infolist()
        except NormwiseError:
            raise
        except Exception as error:  # zipfile raises what a damaged directory makes it trip over
            file.refuse(
                f"a zip archive whose directory cannot be read ({shown(str(error), 200)}): it was "
                "cut short or damaged"
            )
        # A file that was cut inside an archive which holds another ends with the inner directory.
        if entries and min(entry.header_offset for entry in entries) != 0:
            file.refuse(
                "a zip archive whose directory does not fit it: it was cut short or damaged"
            )
        # torch puts everything in one folder, named after the file as it was first saved.
        folders = {entry.filename.partition("/")[0] for entry in entries}
        self.folder = folders.pop() + "/" if len(folders) == 1 else ""
        self._entries = {entry.filename.removeprefix(self.folder): entry for entry in entries}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self, start: str = "") -> list[str]:
        return [name for name in self._entries if name.startswith(start)]

    def region(self, name: str) -> Region:
        """Where the bytes of an entry lie."""
        entry = self._entries.get(name)
        if entry is None:
            self.file.refuse(f"an archive without {shown(name)}")
        if entry.flag_bits & ENCRYPTED or entry.compress_type != zipfile.ZIP_STORED:
            self.file.refuse(
                f"an archive in which {shown(name)} is compressed or encrypted "
                f"({entry.compress_size} bytes for {entry.file_size})",
                "saving it with torch.save, which stores tensors as they are",
            )
        head = self.file.read(entry.header_offset, LOCAL, f"the header of {shown(name)}")
        if head[:4] != b"PK\x03\x04":
            self.file.refuse(f"an archive whose directory is wrong about {shown(name)}")
        start = entry.header_offset + LOCAL
        start += int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        return self.file.part(start, entry.file_size, f"the entry {shown(name)}")

    def text(self, name: str) -> str:
        """A short entry such as a version; '' if there is none."""
        if name not in self:
            return ""
        region = self.region(name)
        return region.read(0, min(region.size, 64)).decode("ascii", "replace").strip()
