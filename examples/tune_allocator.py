"""What `tune_allocator` does to time and page faults: fresh processes with and without, in turn.

Run: python examples/tune_allocator.py [rounds]
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import normwise as nw
from normwise import tune_allocator

SHAPES = ((32, 64, 112, 112), (32, 256, 56, 56))
WARMUP, CALLS = 3, 5


def measure(call: Callable[[], object]) -> tuple[float, float]:
    """Median milliseconds and mean page faults of a call."""
    for _ in range(WARMUP):
        call()
    times, faults = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return statistics.median(times) * 1e3, faults / CALLS


def training_step(bn: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        x.grad = None
        bn(x).backward(dy)

    return call


def worker() -> dict[str, tuple[float, float]]:
    rows = {}
    for shape in SHAPES:
        x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
        for name, module in (("normwise", nw.nn), ("torch.nn", torch.nn)):
            bn = module.BatchNorm2d(shape[1])
            rows[f"{shape} {name} forward"] = measure(lambda bn=bn, x=x: bn(x))
            rows[f"{shape} {name} forward + backward"] = measure(training_step(bn, x, dy))
        rows[f"{shape} torch.add"] = measure(lambda x=x, dy=dy: torch.add(x.detach(), dy))
    return rows


def main(rounds: int = 3) -> None:
    found: dict[str, list[dict[str, tuple[float, float]]]] = {"as is": [], "tuned": []}
    for _ in range(rounds):
        for regime, runs in found.items():
            command = [sys.executable, __file__, "--worker", regime]
            runs.append(json.loads(subprocess.check_output(command, text=True)))
    print(f"{'':45} {'as is':>17} {'tuned':>17}   ratio")
    for row in found["as is"][0]:
        (ms, faults), (tuned_ms, tuned_faults) = (
            [statistics.median(run[row][i] for run in runs) for i in (0, 1)]
            for runs in found.values()
        )
        print(
            f"{row:45} {ms:5.0f} ms {faults:7.0f} f {tuned_ms:5.0f} ms {tuned_faults:7.0f} f"
            f"   {tuned_ms / ms:.2f}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        if sys.argv[2] == "tuned":
            tune_allocator()
        print(json.dumps(worker()))
    else:
        main(*map(int, sys.argv[1:]))
