"""``normwise.tune_allocator()``: a process keeps the memory of its tensors for the next ones.

The switches are those of glibc's ``mallopt``; docs/allocator.md explains and measures them.
"""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["AllocatorReport", "tune_allocator"]

_MIB = 2**20
# The numbers of <malloc.h>.
_PARAMETERS = {"M_TRIM_THRESHOLD": -1, "M_MMAP_THRESHOLD": -3, "M_MMAP_MAX": -4, "M_ARENA_MAX": -8}

# Neither M_MMAP_THRESHOLD (glibc before 2.35 refuses more than 32 MiB; M_MMAP_MAX=0 needs no
# threshold) nor M_TOP_PAD: with 64 MiB of it one run had the same page faults and no less time.
_KEEP = {
    "M_MMAP_MAX": 0,  # no block gets a mapping of its own
    "M_TRIM_THRESHOLD": -1,  # the top of the heap is never given back (mallopt(3): -1 is never)
}
# A thread with an arena of its own cannot hold more than 64 MiB there: glibc 2.36 then maps the
# block whatever M_MMAP_MAX says (25,089 page faults for 98 MiB in a thread; 0 in the main arena).
_SHARE = {"M_ARENA_MAX": 1}
# The rule by which glibc moves its thresholds cannot be switched on again.  These are its ceilings,
# where a program that has freed large tensors had arrived; its start, 128 KiB, would map every
# tensor above that size for good.
_USUAL = {
    "M_MMAP_MAX": 65536,
    "M_MMAP_THRESHOLD": 32 * _MIB,
    "M_TRIM_THRESHOLD": 64 * _MIB,
}

_lock = threading.Lock()
_arenas_limited = False  # by us, in this process


@dataclass(frozen=True)
class AllocatorReport:
    """What :func:`tune_allocator` did.

    Attributes:
        allocator: who serves ``malloc`` here, such as ``'glibc 2.36'``.
        keeps_memory: True if freed memory now stays with the process because of this call.
        applied: (parameter of ``mallopt``, value) of every setting that was accepted.
        skipped: (what, why) of everything that could not be done.
        released: bytes by which the resident memory shrank, if it was asked for and can be known.
    """

    allocator: str
    keeps_memory: bool
    applied: tuple[tuple[str, int], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    released: int | None = None

    def __str__(self) -> str:
        held = "stays with the process" if self.keeps_memory else "is handled as the allocator does"
        lines = [f"allocator: {self.allocator}; freed memory {held}"]
        lines += [f"  set      {name} = {value}" for name, value in self.applied]
        lines += [f"  skipped  {what}: {why}" for what, why in self.skipped]
        if self.released is not None:
            lines.append(f"  released {self.released / _MIB:.0f} MiB")
        return "\n".join(lines)


class _DlInfo(ctypes.Structure):
    """Dl_info of <dlfcn.h>."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _process() -> Any:
    """The symbols of this process; None where there is no such thing (Windows)."""
    return ctypes.CDLL(None) if os.name == "posix" else None


def _library_of(process: Any, symbol: str) -> int | None:
    """Where the library that serves a symbol was loaded."""
    info = _DlInfo()
    address = ctypes.cast(getattr(process, symbol), ctypes.c_void_p)
    found = process.dladdr(address, ctypes.byref(info))
    return info.base if found else None


def _glibc(process: Any) -> tuple[str, str | None]:
    """The allocator's name, and why its settings cannot be changed (None: they can)."""
    try:
        version = process.gnu_get_libc_version
        for needed in ("mallopt", "malloc_trim", "dladdr", "malloc"):
            getattr(process, needed)
    except AttributeError:
        return "not glibc", "needs Linux with glibc; musl, macOS and Windows have no such settings"
    version.restype = ctypes.c_char_p
    name = f"glibc {version().decode()}"
    # jemalloc or tcmalloc by LD_PRELOAD: glibc's mallopt would say 1 and change nothing in use.
    if _library_of(process, "malloc") != _library_of(process, "gnu_get_libc_version"):
        return "not glibc's", "another library serves malloc here (LD_PRELOAD?); set it up instead"
    return name, None


def _resident() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _release(process: Any) -> int | None:
    before = _resident()
    process.malloc_trim.argtypes = [ctypes.c_size_t]
    process.malloc_trim(0)
    after = _resident()
    return None if before is None or after is None else max(before - after, 0)


def tune_allocator(
    enabled: bool = True, *, threads: bool = True, release: bool = False
) -> AllocatorReport:
    """Keep the memory of freed tensors in the process, so that the next ones cost no page faults.

    Left alone, glibc asks the kernel for every block above a threshold (at most 32 MiB) and gives
    it back when it is freed; each new tensor of that size then costs a page fault for every 4 KiB.
    Call this once, after the imports and before threads are started.  It changes the whole process
    and no result.  **Freed memory no longer goes back to the system** until it is released.
    A second call does no harm.  Where the settings do not exist (musl, macOS, Windows, jemalloc)
    nothing is done, and the report says so.

    Args:
        enabled: False goes back to returning memory, and releases what is free.  glibc's moving
            thresholds cannot be restored: they stay at their ceilings (32 MiB mapped, 64 MiB kept).
            Threads that were started meanwhile go on sharing an arena.
        threads: have threads that start later use the main arena too; those with an arena of
            their own get every block above 64 MiB fresh from the kernel.  False leaves the number
            of arenas alone, for programs in which many threads allocate small blocks at once.
        release: give back what is free now (``malloc_trim(0)``); the settings stay.

    Returns:
        An :class:`AllocatorReport`: what was set, and what could not be and why.

    Raises:
        Nothing of its own.

    Source: the manual page mallopt(3); malloc/malloc.c and malloc/arena.c of glibc 2.36.

    Example:
        >>> import normwise as nw
        >>> report = nw.tune_allocator()  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
        allocator: glibc 2.36; freed memory stays with the process
          set      M_MMAP_MAX = 0
          set      M_TRIM_THRESHOLD = -1
          set      M_ARENA_MAX = 1
    """
    global _arenas_limited
    process = _process()
    name, obstacle = _glibc(process)
    if obstacle is not None:
        return AllocatorReport(name, False, skipped=(("all settings", obstacle),))

    applied, skipped = [], []
    with _lock:
        wanted = _KEEP | (_SHARE if threads else {}) if enabled else dict(_USUAL)
        if not enabled and _arenas_limited:
            # glibc's own limit on 64 bits: eight arenas for each core.
            wanted["M_ARENA_MAX"] = 8 * (os.cpu_count() or 1)
        for parameter, value in wanted.items():
            if process.mallopt(_PARAMETERS[parameter], value) == 1:
                applied.append((parameter, value))
            else:
                skipped.append((parameter, f"mallopt refused the value {value}"))
        if ("M_ARENA_MAX", 1) in applied:
            _arenas_limited = True
        released = _release(process) if release or not enabled else None
    keeps = enabled and _KEEP.items() <= dict(applied).items()
    return AllocatorReport(name, keeps, tuple(applied), tuple(skipped), released)
