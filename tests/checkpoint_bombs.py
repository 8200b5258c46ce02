"""Files that are small, or lie, and would take far more memory, time or stack than they have bytes.

Each is made when it is asked for; a reader has to refuse every one.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable

import checkpoint_files as make
import torch
from onnx import TensorProto, helper

MB = 2**20
HEAD = b"\x80\x02"
BOMBS: dict[str, Callable[[], bytes]] = {}


def bomb(suffix: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    def keep(make_it: Callable[[], bytes]) -> Callable[[], bytes]:
        BOMBS[make_it.__name__ + suffix] = make_it
        return make_it

    return keep


# Pickles: a file name, and the program


def tensor(numel: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A state dict of one tensor, as torch writes it, whatever its numbers."""
    integer = lambda n: b"\x8a" + bytes([9]) + n.to_bytes(9, "little")  # noqa: E731 # LONG1
    sizes = lambda t: b"(" + b"".join(map(integer, t)) + b"t"  # noqa: E731 one line, used once
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
    return (
        HEAD + b"}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(numel)
        + b"tQK\0" + sizes(shape) + sizes(strides) + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


PROGRAMS: dict[str, Callable[[], bytes]] = {
    "a memo index of 2**32": lambda: HEAD + b"Nr\xff\xff\xff\xff\x85" * 2,
    "empty dictionaries": lambda: HEAD + b"}" * (14 * MB),
    "marks": lambda: HEAD + b"(" * (14 * MB),
    "empty lists": lambda: HEAD + b"]" * (14 * MB),
    "short texts": lambda: HEAD + b"U\x02ab" * (3 * MB) + b".",
    "integers": lambda: HEAD + b"M\xff\xff" * (3 * MB) + b".",
    "more than it may have": lambda: HEAD + b"N0" * (9 * MB) + b".",
    "a text of 2**62": lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "bytes of 2**62": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.",
    "a bytearray of 2**62": lambda: b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"a.",
    "an integer of 2**31": lambda: HEAD + b"\x8b\xff\xff\xff\x7f1.",
    "digits": lambda: b"L" + b"9" * (8 * MB) + b"L\n.",
    "a line": lambda: b"S'" + b"9" * (8 * MB) + b"'\n.",
    "a frame of 2**62": lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "a tuple of depth 300,000 as a key": lambda: HEAD + b"})" + b"\x85" * 300_000 + b"Ns.",
    "a tuple of depth 300,000": lambda: HEAD + b")" + b"\x85" * 300_000 + b".",
    "dictionaries of depth 60,000": lambda: HEAD + b"}U\1a" * 60_000 + b"N" + b"s" * 59_999 + b".",
    "2**60 references": lambda: (
        HEAD + b"}q\0" + b"".join(b"}U\1ah" + bytes([i]) + b"sU\1bh" + bytes([i]) + b"sq"
                                  + bytes([i + 1]) for i in range(60)) + b"."
    ),
    "tuples of tuples": lambda: HEAD + b")" + b"2\x86" * 200 + b".",
    "a list in itself": lambda: HEAD + b"]q\0h\0a.",
    "a storage of 2**60": lambda: tensor(2**60, (4,), (1,)),
    "a shape of 2**60": lambda: tensor(4, (2**60,), (0,)),
    "a shape of 2**120": lambda: tensor(4, (2**60, 2**60), (0, 0)),
    "a stride of 2**62": lambda: tensor(4, (4,), (2**62,)),
    "200 axes": lambda: tensor(4, (1,) * 200, (1,) * 200),
    "names of 40 kB": lambda: tensor(1, (1,), (1,)).replace(
        b"X\x01\0\0\0a", b"X" + struct.pack("<I", 40_000) + b"a" * 40_000),
}  # fmt: skip
# Two seconds each until a limit is met: once is enough.
SLOW = ("empty dictionaries", "marks", "empty lists", "short texts", "integers",
        "more than it may have", "a tuple of depth 300,000")  # fmt: skip

for _name, _program in PROGRAMS.items():
    BOMBS[f"{_name}.pt"] = lambda program=_program: make.with_pickle(program())  # type: ignore[misc] # bound now
    if _name not in SLOW:
        BOMBS[f"{_name}, alone.pkl"] = _program


@bomb(".pt")
def norms_that_share_one_large_storage() -> bytes:
    vector = torch.zeros(256 * 1024)
    names = (f"{i}.{role}" for i in range(2000) for role in ("running_mean", "running_var"))
    return make.saved(OrderedDict((name, vector) for name in names))


# Zip archives


@bomb(".pt")
def zeros_compressed_to_a_thousandth() -> bytes:
    n = 4 * MB
    program = tensor(n, (n,), (1,))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/data/0", bytes(4 * n), zipfile.ZIP_DEFLATED)
    return file.getvalue()


@bomb(".pt")
def a_pickle_compressed_to_a_thousandth() -> bytes:
    return make.zipped({"a/data.pkl": HEAD + b"}0" * (8 * MB) + b"."}, zipfile.ZIP_DEFLATED)


@bomb(".pt")
def an_archive_of_100_000_entries() -> bytes:
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<HHH", 6, 0, 50) + bytes(12) + b"a/data"
    directory = (entry + bytes(50)) * 100_000
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 34464, 34464, len(directory), 4, 0)
    return b"PK\x03\x04" + directory + end


@bomb(".pt")
def entries_of_2_to_the_62() -> bytes:
    data = bytearray(make.saved(make.state()))
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 20 : at + 28] = b"\xfe\xff\xff\xff" * 2
        at = data.find(b"PK\x01\x02", at + 1)
    return bytes(data)


# JSON


def _nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


@bomb(".safetensors")
def a_header_of_empty_lists() -> bytes:
    return make.safe_of(b'{"a":[' + b"[]," * (5 * MB) + b"[]]}")


@bomb(".safetensors")
def a_header_of_depth_100_000() -> bytes:
    return make.safe_of(_nested(100_000))


@bomb(".safetensors")
def a_header_of_numbers() -> bytes:
    return make.safe_of(b'{"a":[' + b"1e5," * (3 * MB) + b"1]}")


@bomb(".safetensors")
def a_header_of_20_MB() -> bytes:
    return make.safe_of(b'{"a":"' + b"a" * (20 * MB) + b'"}')


@bomb(".safetensors")
def a_number_of_a_million_digits() -> bytes:
    return make.safe_of(b'{"a":' + b"9" * 1_000_000 + b"}")


@bomb(".safetensors")
def a_header_of_2_to_the_63() -> bytes:
    return struct.pack("<Q", 2**63) + b'{"a":1}'


@bomb(".safetensors")
def a_tensor_of_a_million_axes() -> bytes:
    entry = {"dtype": "F32", "shape": [1] * 1_000_000, "data_offsets": [0, 4]}
    return make.safe_of({"a": entry}, bytes(4))


@bomb(".index.json")
def an_index_of_empty_objects() -> bytes:
    return b'{"weight_map":[' + b"{}," * (5 * MB) + b"{}]}"


@bomb(".index.json")
def an_index_of_many_files() -> bytes:
    return json.dumps({"weight_map": {str(i): f"{i}.bin" for i in range(50_000)}}).encode()


@bomb(".pt2")
def a_program_of_empty_lists() -> bytes:
    entries = make.unzipped(make.exported(make.state()))
    entries["n/data/weights/model_weights_config.json"] = b"[" + b"[]," * (5 * MB) + b"[]]"
    return make.zipped(entries)


# Protocol buffers


def _field(number: int, data: bytes) -> bytes:
    size, length = len(data), b""
    while True:
        length += bytes([size & 127 | (128 if size > 127 else 0)])
        size >>= 7
        if not size:
            return bytes([number << 3 | 2]) + length + data


@bomb(".onnx")
def a_graph_of_empty_messages() -> bytes:
    return _field(7, b"\x5a\0" * (3 * MB))


@bomb(".onnx")
def a_graph_of_names_for_names() -> bytes:
    nodes = (helper.make_node("Identity", ["a"], [f"b{i}"]) for i in range(1000))
    return _field(7, b"".join(_field(1, node.SerializeToString()) for node in nodes) * 400)


@bomb(".onnx")
def an_initializer_of_2_to_the_60() -> bytes:
    t = TensorProto(name="a", data_type=1, dims=[2**60], raw_data=b"1234")
    return _field(7, _field(5, t.SerializeToString()))


@bomb(".onnx")
def an_initializer_of_a_million_axes() -> bytes:
    t = TensorProto(name="a", data_type=1, dims=[1] * 1_000_000, raw_data=b"1234")
    return _field(7, _field(5, t.SerializeToString()))


@bomb(".onnx")
def statistics_of_4_MB_in_numbers_of_a_byte() -> bytes:
    tensors = [TensorProto(name=f"1.{r}", data_type=17, dims=[4 * MB]) for r in make.ROLES[:4]]
    body = [t.SerializeToString() + _field(5, bytes(4 * MB)) for t in tensors]
    node = make.norm_node("1", "x", "y").SerializeToString()
    return _field(7, b"".join(_field(5, b) for b in body) + _field(1, node))
