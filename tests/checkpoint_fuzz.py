"""Reads thousands of damaged and hostile files for test_checkpoints_fuzz.py, reports as JSON.

Usage: checkpoint_fuzz.py <folder>

In a process of its own, so that a crash is seen, memory can be limited, and every event that Python
audits (a file written, a process started, code compiled, a class looked up by pickle) is counted
while a file is read.
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import random
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoint_files as make
import torch
from checkpoint_bombs import BOMBS

from normwise.errors import CheckpointError
from normwise.interop.checkpoints import open_checkpoint

MB = 2**20
EXTRA = 320 * MB  # of address space, beside what the process has before it starts
Case = tuple[str, bytes]

# Of Python's audit events, those that reading a file has no business with.
FORBIDDEN = ("exec", "compile", "import", "marshal.", "pickle.", "os.", "subprocess.", "shutil.",
             "socket.", "ctypes.", "code.", "pty.", "signal.", "mmap.", "urllib.")  # fmt: skip
ALLOWED = ("os.listdir", "os.scandir")
reading, events = False, []


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    if reading:
        if event == "open":
            mode, flags = arguments[1], arguments[2] or 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set("wax+"):
                events.append(f"open {arguments[0]!r} to write")
        elif event.startswith(FORBIDDEN) and event not in ALLOWED:
            events.append(f"{event} {arguments!r}"[:200])


# Damage: (name, bytes) of a sound file to one that is not


def cut(r: random.Random, data: bytes) -> bytes:
    return data[: r.randrange(len(data))]


def flipped(r: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8, 64))):
        changed[r.randrange(len(changed))] ^= 1 << r.randrange(8)
    return bytes(changed)


EXTREMES = (b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\xff" * 7 + b"\x7f", b"\0\0\0\x80",
            b"\x01" + bytes(7), b"\xff\xff")  # fmt: skip


def overwritten(r: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(r.choice((1, 1, 3))):
        at, piece = r.randrange(len(changed)), r.choice((*EXTREMES, r.randbytes(r.randint(1, 40))))
        changed[at : at + len(piece)] = piece
    return bytes(changed)


def moved(r: random.Random, data: bytes) -> bytes:
    """A piece left out, put in twice, or put elsewhere."""
    a, b = sorted(r.randrange(len(data)) for _ in range(2))
    b = min(b, a + 200)
    to = r.randrange(len(data))
    return r.choice((data[:a] + data[b:], data[:b] + data[a:], data[:to] + data[a:b] + data[to:]))


def spliced(r: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: r.randrange(len(data))] + other[r.randrange(len(other)) :]


WRONG = (
    None,
    True,
    -1,
    0,
    2**63,
    1e300,
    "",
    "a",
    "../a",
    [],
    {},
    [[]],
    [1, 2],
    {"a": 1},
    "\0",
    [None],
)


def retyped(r: random.Random, value: Any) -> Any:
    """JSON with one place of another type or value."""
    if r.random() < 0.15 or not isinstance(value, (dict, list)) or not value:
        return r.choice(WRONG)
    key = r.choice(list(value)) if isinstance(value, dict) else r.randrange(len(value))
    if r.random() < 0.1:
        return (
            {**value, str(r.choice(WRONG)): r.choice(WRONG)}
            if isinstance(value, dict)
            else [*value, 1]
        )
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = retyped(r, value[key])
    return copy


def any_damage(r: random.Random, data: bytes) -> bytes:
    return r.choice((cut, flipped, overwritten, moved))(r, data)


# Families of cases


def of_bytes(
    damage: Callable[[random.Random, bytes], bytes], n: int
) -> Callable[..., Iterator[Case]]:
    def cases(r: random.Random, files: dict[str, bytes]) -> Iterator[Case]:
        names = list(files)
        for i in range(n):
            name = names[i % len(names)]
            yield name, damage(r, files[name])

    return cases


def splices(r: random.Random, files: dict[str, bytes]) -> Iterator[Case]:
    for _ in range(300):
        a, b = r.choice(list(files)), r.choice(list(files))
        yield a, spliced(r, files[a], files[b])


def inside_archives(r: random.Random, files: dict[str, bytes]) -> Iterator[Case]:
    """A sound archive of damaged entries: what checksums and directories would have caught."""
    names = ("net.pt", "nested.pth", "script.pt", "net.pt2", "old.pt2")
    archives = {name: make.unzipped(files[name]) for name in names}
    for i in range(700):
        name = names[i % len(names)]
        entries = dict(archives[name])
        kinds = (".pkl", ".json", ".pt", "byteorder", "version", "archive_format")
        which = r.choice([n for n in entries if n.endswith(kinds)])
        entries[which] = any_damage(r, entries[which])
        yield name, make.zipped(entries)


def pickles_at_random(r: random.Random, files: dict[str, bytes]) -> Iterator[Case]:
    """Steps in any order, with what they need and without."""
    codes = [op.code.encode("latin-1") for op in pickletools.opcodes]
    sound = make.unzipped(files["net.pt"])["archive/data.pkl"]
    arguments = (b"", b"\0", b"a\n", b"\x01\0\0\0a", b"1\n", b"posix\nmkdir\n")
    pieces = [sound[i : i + 12] for i in range(0, len(sound), 6)]
    for _ in range(500):
        steps = [r.choice(codes) + r.choice(arguments) for _ in range(r.randint(1, 20))]
        steps += r.choices(pieces, k=r.randint(0, 10))
        r.shuffle(steps)
        program = b"\x80\x02" + b"".join(steps)
        yield r.choice((("a.pt", make.with_pickle(program + b".")), ("a.pkl", program + b".")))


def wrong_json(r: random.Random, files: dict[str, bytes]) -> Iterator[Case]:
    data = files["net.safetensors"]
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    program = make.unzipped(files["net.pt2"])
    parts = [name for name in program if name.endswith(".json")]
    places = {"weight_map": dict.fromkeys(make.state(), "net.safetensors")}
    for i in range(900):
        if i % 3 == 0:
            yield "a.safetensors", make.safe_of(retyped(r, header), body)
        elif i % 3 == 1:
            part = r.choice(parts)
            changed = json.dumps(retyped(r, json.loads(program[part]))).encode()
            yield "a.pt2", make.zipped({**program, part: changed})
        else:
            yield "a.safetensors.index.json", json.dumps(retyped(r, places)).encode()


HOSTILE = (
    ("os", "mkdir"), ("posix", "mkdir"), ("posix", "system"), ("os", "system"), ("nt", "system"),
    ("subprocess", "Popen"), ("subprocess", "check_output"), ("builtins", "eval"),
    ("builtins", "exec"), ("__builtin__", "eval"), ("builtins", "getattr"),
    ("builtins", "__import__"), ("builtins", "open"), ("importlib", "import_module"),
    ("runpy", "run_path"), ("pty", "spawn"), ("shutil", "rmtree"), ("pathlib", "Path.mkdir"),
    ("torch", "load"), ("torch.storage", "_load_from_bytes"), ("torch.hub", "load"),
    ("torch._utils", "_import_dotted_name"), ("torch.nn", "Module"), ("numpy", "load"),
    ("numpy.testing._private.utils", "runstring"), ("pickle", "loads"), ("marshal", "loads"),
    ("types", "FunctionType"), ("types", "CodeType"), ("operator", "attrgetter"),
    ("functools", "partial"), ("webbrowser", "open"), ("ctypes", "CDLL"), ("code", "interact"),
    ("timeit", "timeit"), ("socket", "create_connection"), ("collections", "OrderedDict.update"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("copyreg", "add_extension"),
    ("normwise.interop.checkpoints.globals", "call"),
)  # fmt: skip


def hostile(r: random.Random, files: dict[str, bytes]) -> Iterator[Case]:
    """Each name, by each step that can call it, in each kind of file; the calls make a folder."""
    target = os.path.abspath("was_run")
    argument = b"X" + struct.pack("<I", len(target)) + target.encode()
    for module, name in HOSTILE:
        old = f"c{module}\n{name}\n".encode()
        new = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name)) + b"\x93"
        calls = [
            old + argument + b"\x85R", new + argument + b"\x85R", b"(" + argument +
            f"i{module}\n{name}\n".encode(), b"(" + old + argument + b"o",
            old + argument + b"\x85\x81", new + argument + b"\x85}\x92",
            b"ccopyreg\n_reconstructor\n(" + old + old + b"NtR",
            old + argument + b"\x85\x81}X\x01\0\0\0aNsb", b"}(" + argument + old + argument +
            b"\x85Ru",
            b"ctorch._tensor\n_rebuild_from_type_v2\n(" + old + old + argument + b"\x85}tR"
            + old + argument + b"\x85R",
        ]  # fmt: skip
        for call in calls:
            data = b"\x80\x04" + call + b"."
            yield "a.pt", make.with_pickle(data, files["net.pt"])
            yield "a.pkl", data
        magic = files["legacy.pt"][: files["legacy.pt"].index(b".\x80") + 1]
        yield "a.pt", magic + pickle.dumps(1001, 2) + b"\x80\x02" + calls[0] + b"."


FAMILIES: dict[str, Callable[[random.Random, dict[str, bytes]], Iterator[Case]]] = {
    "cut short": of_bytes(cut, 700),
    "bits flipped": of_bytes(flipped, 1000),
    "bytes overwritten": of_bytes(overwritten, 700),
    "pieces moved": of_bytes(moved, 400),
    "spliced": splices,
    "damaged inside": inside_archives,
    "steps at random": pickles_at_random,
    "wrong json": wrong_json,
    "hostile": hostile,
    "bombs": lambda r, files: ((name, make_it()) for name, make_it in BOMBS.items()),
}


def read(path: str) -> str:
    """'' if all could be read, otherwise the refusal."""
    global reading
    reading = True
    try:
        with open_checkpoint(path) as checkpoint:
            checkpoint.norms()
            for name in list(checkpoint.tensors)[:20]:
                checkpoint.read(name)
        return ""
    except CheckpointError as error:
        return str(error)
    finally:
        reading = False


def run(family: str, files: dict[str, bytes]) -> dict[str, Any]:
    wrong: list[str] = []
    sizes = {"cases": 0, "read": 0}
    for name, data in FAMILIES[family](random.Random(family), files):
        number = sizes["cases"]
        Path(name).write_bytes(data)
        del data
        # What is being read, for the report of a crash.
        Path("current").write_text(f"{family} {number}: {name}")
        try:
            got = read(name)
        except Exception as error:
            got = f"not refused, but {type(error).__name__}: {error}"
        sizes["cases"] += 1
        sizes["read"] += not got
        strict = family in ("hostile", "bombs")
        if any(word in got for word in ("not refused", "trips", "MemoryError")) or (
            strict and not got
        ):
            wrong.append(f"{family} {number}, {name}: {got or 'read'}"[:500])
        if family == "hostile" and not any(f"{m}.{n}" in got for m, n in HOSTILE):
            wrong.append(f"{family} {number}: {got}"[:500])
        os.unlink(name)
    return {**sizes, "wrong": wrong}


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    torch.set_num_threads(1)
    samples = make.files()
    Path("net.safetensors").write_bytes(samples["net.safetensors"])
    for sample, content in samples.items():  # and everything is imported
        Path(sample).write_bytes(content)
        assert read(sample) == ""
    read("nothing")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.addaudithook(audit)
    report = {family: run(family, samples) for family in FAMILIES}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"families": report, "events": events[:20], "grown": (peak - before) * 1024}))
