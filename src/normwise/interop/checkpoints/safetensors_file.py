"""Safetensors: a length, a JSON header, the bytes of the tensors.

Read here and not by the safetensors library: it maps the whole file, and is an extra. The header is
JSON; what the format promises of it (https://huggingface.co/docs/safetensors) is checked.
"""

from __future__ import annotations

from typing import Any

from normwise.interop.checkpoints.file import Region
from normwise.interop.checkpoints.limits import DESCRIPTION, is_size, numel, parse_json, shown
from normwise.interop.checkpoints.tensors import DTYPES, Stored, strides_of

__all__ = ["looks_like_safetensors", "read_safetensors"]

CODES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
    "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def looks_like_safetensors(head: bytes | bytearray) -> bool:
    """The format has no magic number: a length that is not absurd, then an opening brace."""
    return len(head) > 8 and head[8] == ord("{") and int.from_bytes(head[:8], "little") < 2**32


def _tensor(body: Region, name: str, entry: Any) -> tuple[int, int, Stored]:
    if not isinstance(entry, dict):
        body.refuse(f"a header that says {shown(entry)} of {shown(name)}")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    code: Any = entry.get("dtype")
    fits = (
        isinstance(code, str)
        and isinstance(shape, list)
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(map(is_size, (*shape, *offsets)))
        and offsets[0] <= offsets[1]
    )
    if not fits:
        body.refuse(f"a header whose entry for {shown(name)} is not dtype, shape and offsets")
    begin, end = offsets
    dtype = DTYPES.get(CODES.get(code, ""))
    if dtype is not None and numel(tuple(shape)) * dtype.itemsize != end - begin:
        body.refuse(f"{shown(name)} of dtype {code} and shape {shape[:8]} in {end - begin} bytes")
    region = body.part(begin, end - begin, f"the tensor {shown(name)}")
    size = tuple(shape)
    return begin, end, Stored(size, dtype, region, strides_of(size)).checked(name)


def read_safetensors(file: Region) -> dict[str, Stored]:
    """The tensors by name; none is read."""
    length = int.from_bytes(file.read(0, 8, "the length of a safetensors header"), "little")
    if length > DESCRIPTION:
        file.refuse(f"a safetensors header of {length} bytes, more than one of tensors takes")
    text = file.read(8, length, "a safetensors header")
    try:
        header = parse_json(text)
    except ValueError as error:
        file.refuse(f"a safetensors header that cannot be read ({shown(str(error), 200)})")
    header.pop("__metadata__", None)
    body = file.part(8 + length, file.size - 8 - length, "the tensors")
    places = []
    tensors = {}
    for name, entry in header.items():
        begin, end, tensors[name] = _tensor(body, name, entry)
        places.append((begin, end))
    at = 0
    for begin, end in sorted(places):
        if begin != at:
            body.refuse("tensors that overlap or leave a gap")
        at = end
    if at != body.size:
        body.refuse(f"{body.size} bytes of tensors where the header has {at}: cut short or damaged")
    return tensors
