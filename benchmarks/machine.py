"""Where and with what the figures were measured: without it a time means nothing."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter


def processor() -> str:
    """The CPU's name as its maker gives it, where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def huge_pages() -> str:
    """Transparent huge pages decide what a page fault costs: 4 KiB or 2 MiB each."""
    try:
        line = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return line[line.find("[") + 1 : line.find("]")]


class Meter:
    """What `other_load` found out, once its block has ended."""

    cores: float = math.nan


@contextmanager
def other_load() -> Iterator[Meter]:
    """How many cores other programs kept busy during the block; NaN where the system does not tell.

    It decides whether a figure is worth anything: a call that splits its work among all cores waits
    for whichever of them is taken, several milliseconds at a time, and one that does not runs on.
    """
    meter = Meter()
    busy, own, start = _busy_seconds(), _own_seconds(), perf_counter()
    yield meter
    others = (_busy_seconds() - busy) - (_own_seconds() - own)
    meter.cores = max(others, 0.0) / (perf_counter() - start)  # NaN stays NaN


def _busy_seconds() -> float:
    """All processors' time that was not idle, since the start of the system."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return math.nan
    # user, nice, system, idle, iowait, irq, softirq, steal; what follows is contained in user
    ticks = [int(word) for word in words[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def describe(threads: int) -> dict[str, str]:
    """Facts that stand in every line of the CSV and at the head of the table."""
    libc = " ".join(platform.libc_ver()).strip() or "unknown"
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": processor(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "python": platform.python_version(),
        "libc": libc,
        "huge_pages": huge_pages(),
        "load_at_start": load,
    }
