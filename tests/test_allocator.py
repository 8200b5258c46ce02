"""tune_allocator: page faults are counted in fresh processes, so that this one stays as it is."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from typing import Any

import pytest

from normwise.tools import allocator
from normwise.tools.allocator import AllocatorReport, tune_allocator

PROCESS = allocator._process()
NAME, OBSTACLE = allocator._glibc(PROCESS)
needs_glibc = pytest.mark.skipif(OBSTACLE is not None, reason=f"{NAME}: {OBSTACLE}")

# malloc itself rather than tensors: nothing else comes between two blocks. torch, which takes
# seconds to import, stays out: only the one file is read.
PRELUDE = """
import ctypes, importlib.util, json, pathlib, resource, sys, threading
spec = importlib.util.spec_from_file_location("allocator", {file!r})
allocator = sys.modules["allocator"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(allocator)
tune = allocator.tune_allocator
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
MIB = 2**20
PAGE = resource.getpagesize()

def faults(size=64 * MIB, calls=2):
    "Share of the block's pages that fault when it is allocated, written and freed again."
    def once():
        block = libc.malloc(size)
        ctypes.memset(block, 1, size)
        libc.free(block)
    once()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        once()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return (after - before) * PAGE / (calls * size)

def in_thread(f):
    out = []
    thread = threading.Thread(target=lambda: out.append(f()))
    thread.start()
    thread.join()
    return out[0]
"""


def fresh(code: str) -> Any:
    """What code prints as JSON in a new interpreter that has read the module and nothing else."""
    prelude = PRELUDE.format(file=allocator.__file__)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + code],
        capture_output=True,
        text=True,
        check=True,
        env={},  # neither GLIBC_TUNABLES nor LD_PRELOAD
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


@needs_glibc
def test_freed_memory_is_used_again() -> None:
    before, after = fresh("a = faults(); tune(); print(json.dumps([a, faults()]))")
    # Transparent huge pages ('always') take 512 pages in one fault: only then is `before` small.
    assert after < 0.05
    assert after < before / 10 or before < 0.05


@needs_glibc
def test_import_changes_nothing() -> None:
    """The settings cannot be read; what they do can: a large block is still no part of the heap."""
    code = """
import normwise
import normwise.tools.allocator

def mapped():
    block = libc.malloc(64 * MIB)
    lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
    heaps = [line.split()[0].split("-") for line in lines if line.endswith("[heap]")]
    inside = any(int(first, 16) <= block < int(end, 16) for first, end in heaps)
    libc.free(block)
    return not inside
a = mapped()
tune()
print(json.dumps([a, mapped()]))
"""
    assert fresh(code) == [True, False]


@needs_glibc
def test_threads_started_later_use_memory_again() -> None:
    """The block is larger than a thread's own arena can be (64 MiB)."""
    assert fresh("tune(); print(json.dumps(in_thread(lambda: faults(80 * MIB))))") < 0.05


@needs_glibc
def test_twice_is_harmless() -> None:
    same, share = fresh("a, b = tune(), tune(); print(json.dumps([a == b, faults()]))")
    assert same
    assert share < 0.05


@needs_glibc
def test_release_gives_back_and_keeps_the_settings() -> None:
    code = """
tune()
faults()
report = tune(release=True)
print(json.dumps([report.keeps_memory, report.released, faults()]))
"""
    keeps, released, share = fresh(code)
    assert keeps
    assert released > 60 * 2**20
    assert share < 0.05


@needs_glibc
def test_undo_returns_memory_again() -> None:
    code = """
def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * PAGE
tune()
faults(160 * MIB, 1)
kept = resident()
report = tune(False)
after = resident()
faults(160 * MIB, 1)
print(json.dumps([kept, after, resident(), report.keeps_memory, dict(report.applied)]))
"""
    kept, after, later, keeps, applied = fresh(code)
    assert kept > 160 * 2**20
    assert after < 100 * 2**20
    assert later < 100 * 2**20
    assert not keeps
    assert applied["M_MMAP_MAX"] == 65536
    assert applied["M_MMAP_THRESHOLD"] == 32 * 2**20
    assert applied["M_ARENA_MAX"] > 1


@needs_glibc
def test_undo_leaves_arenas_alone_that_were_not_limited() -> None:
    names = fresh("tune(threads=False); print(json.dumps(dict(tune(False).applied)))")
    assert "M_ARENA_MAX" not in names


@needs_glibc
def test_report_says_what_was_set() -> None:
    code = "r = tune(); print(json.dumps([r.allocator, r.applied, r.skipped, r.released, str(r)]))"
    name, applied, skipped, released, text = fresh(code)
    assert name == NAME
    assert name.startswith("glibc 2.")
    assert applied == [["M_MMAP_MAX", 0], ["M_TRIM_THRESHOLD", -1], ["M_ARENA_MAX", 1]]
    assert skipped == []
    assert released is None
    assert "stays with the process" in text
    assert "M_ARENA_MAX = 1" in text


# Where it cannot be done


class Refusing:
    """A libc whose mallopt says no to some parameters, and remembers the rest."""

    def __init__(self, *refused: int) -> None:
        self.refused, self.calls = refused, []  # type: tuple[int, ...], list[tuple[int, int]]

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return int(parameter not in self.refused)


@pytest.mark.parametrize("process", [None, object()], ids=["windows", "musl or macos"])
def test_without_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch, process: object) -> None:
    monkeypatch.setattr(allocator, "_process", lambda: process)
    for report in (tune_allocator(), tune_allocator(False), tune_allocator(release=True)):
        assert report.allocator == "not glibc"
        assert not report.keeps_memory
        assert report.applied == ()
        assert "needs Linux with glibc" in report.skipped[0][1]
        assert "skipped" in str(report)


@needs_glibc
def test_another_allocator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """jemalloc by LD_PRELOAD: glibc's mallopt would succeed and change nothing that is in use."""
    monkeypatch.setattr(allocator, "_library_of", lambda process, symbol: hash(symbol))
    report = tune_allocator()
    assert report.applied == ()
    assert "another library serves malloc" in report.skipped[0][1]


def test_a_refusal_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Refusing(allocator._PARAMETERS["M_MMAP_MAX"])
    monkeypatch.setattr(allocator, "_process", lambda: process)
    monkeypatch.setattr(allocator, "_glibc", lambda process: ("glibc 2.0", None))
    monkeypatch.setattr(allocator, "_arenas_limited", False)
    report = tune_allocator(threads=False)
    assert report == AllocatorReport(
        "glibc 2.0",
        False,
        applied=(("M_TRIM_THRESHOLD", -1),),
        skipped=(("M_MMAP_MAX", "mallopt refused the value 0"),),
    )
    assert process.calls == [(-4, 0), (-1, -1)]


@needs_glibc
def test_malloc_is_found_in_its_library() -> None:
    assert isinstance(PROCESS, ctypes.CDLL)
    base = allocator._library_of(PROCESS, "malloc")
    assert base
    assert base != allocator._library_of(PROCESS, "Py_IsInitialized")
