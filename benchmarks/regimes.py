"""Two ways to get memory for an output: as a user gets it, and as if it were allocated beforehand.

Left alone, glibc asks the kernel for fresh pages for every block above a threshold (at most 32 MiB,
moving with what the program freed before) and gives them back when the block is freed.  Each output
then costs one page fault for every 4 KiB, which can be more than batch norm itself.  PyTorch's
modules allocate their own outputs, so for the second regime the allocator is told to keep what is
freed and hand it out again.  It reads its settings when a process starts, hence a process for each
regime.  Every row carries the page faults of a call, so that nobody has to believe it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

USER, PREALLOCATED = "user", "preallocated"
REGIMES = (USER, PREALLOCATED)

_MIB = 2**20
# Never map a block of its own; never give the top of the heap back; take it 64 MiB at a time.
# mmap_max besides mmap_threshold, as glibc before 2.35 refuses a threshold above 32 MiB.
_TUNABLES = {
    "glibc.malloc.mmap_max": 0,
    "glibc.malloc.mmap_threshold": 2**40,
    "glibc.malloc.trim_threshold": 2**40,
    "glibc.malloc.top_pad": 64 * _MIB,
}

ROOT = Path(__file__).resolve().parents[1]


def environment(regime: str, base: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of the regime's process; the user's own are kept."""
    env = dict(base)
    # Compile in the process itself: a pool of idle compilers would sit on the cores we time on.
    env["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if regime == PREALLOCATED:
        ours = [f"{name}={value}" for name, value in _TUNABLES.items()]
        theirs = [base["GLIBC_TUNABLES"]] if base.get("GLIBC_TUNABLES") else []
        env["GLIBC_TUNABLES"] = ":".join(theirs + ours)
    return env


class WorkerFailed(RuntimeError):
    """The measuring process ended before its work did; the message is the end of its stderr."""


def _kill_group(process: subprocess.Popen[str]) -> None:
    """End the worker and its fork: left alone, that would go on beside what is measured next."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def run_worker(regime: str, job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Do `job` (see `benchmarks.worker`) in a fresh process; yield its messages as they come."""
    command: Sequence[str] = (sys.executable, "-m", "benchmarks.worker")
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(regime, os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"regime": regime, **job}))
            process.stdin.close()
            for line in process.stdout:
                yield json.loads(line)
        finally:
            if sys.exc_info()[0] is not None:
                _kill_group(process)
            process.wait()
        if process.returncode != 0:
            errors.seek(0)
            tail = errors.read()[-4000:]
            raise WorkerFailed(
                f"the process of regime {regime!r} ended with code {process.returncode}:\n{tail}"
            )
