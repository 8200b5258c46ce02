"""The wire format of protocol buffers (https://protobuf.dev/programming-guides/encoding): fields of
a message, where they lie, without reading what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from normwise.interop.checkpoints.file import Region
from normwise.interop.checkpoints.limits import FIELDS, NAME

__all__ = ["Field", "Messages", "varints"]

CHUNK = 2**16
VARINT, EIGHT, LENGTH, FOUR = 0, 1, 2, 5


class Field(NamedTuple):
    """``value`` of a number; offset and size of what has a length (or 4 or 8 bytes)."""

    number: int
    wire: int
    value: int
    offset: int
    size: int


def varints(data: bytes | bytearray, most: int) -> list[int]:
    """The first ``most`` numbers of a packed field."""
    numbers, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            numbers.append(value & (2**64 - 1))
            value = shift = 0
            if len(numbers) == most:
                break
        elif shift > 63:
            raise ValueError("a number of more than ten bytes")
    return numbers


class Messages:
    """Reads fields of a file through a window, and counts them: they bound time and memory."""

    def __init__(self, file: Region) -> None:
        self.file = file
        self._chunk, self._start, self._count = bytearray(), 0, 0

    def bytes(self, offset: int, size: int) -> bytearray:
        """A small piece."""
        if not self._start <= offset <= offset + size <= self._start + len(self._chunk):
            if size > CHUNK or offset + size > self.file.size:
                return self.file.read(offset, size, "a field")
            self._chunk = self.file.read(offset, min(CHUNK, self.file.size - offset))
            self._start = offset
        at = offset - self._start
        return self._chunk[at : at + size]

    def text(self, field: Field) -> str:
        """A name, cut where no name goes on."""
        return self.bytes(field.offset, min(field.size, NAME + 1)).decode("utf-8", "replace")

    def fields(self, offset: int, size: int) -> Iterator[Field]:
        """The fields of the message in these bytes."""
        at, end = offset, offset + size
        while at < end:
            self._count += 1
            if self._count > FIELDS:
                self.file.refuse("a message of more fields than a model has")
            # The key and, of a number or a length, the value: ten bytes each at most.
            head = self.bytes(at, min(20, end - at))
            key, used = self._varint(head, 0)
            number, wire, value, length = key >> 3, key & 7, 0, 0
            if wire == VARINT:
                value, used = self._varint(head, used)
            elif wire == LENGTH:
                length, used = self._varint(head, used)
            elif wire in (EIGHT, FOUR):
                length = 8 if wire == EIGHT else 4
            else:
                self.file.refuse("a message with a field of an unknown kind")
            at += used
            if at + length > end:
                self.file.refuse("a message with a field that is longer than itself")
            yield Field(number, wire, value, at, length)
            at += length

    def _varint(self, data: bytearray, at: int) -> tuple[int, int]:
        """The number that starts at this byte, and where it ends."""
        value = shift = 0
        for byte in data[at : at + 10]:
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & (2**64 - 1), at
            shift += 7
        self.file.refuse("a message with a number that does not end")
