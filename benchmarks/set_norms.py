"""Layer, RMS, group and instance norm against torch.nn: ``python -m benchmarks.set_norms``.

Forward without gradients, forward as autograd records it, and forward and backward, each contender
in turn in every round (`timing`); on one thread by the thread's own time. Parameters are float32
where the input is a half type, as under autocast, unless torch.nn refuses that.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import normwise as nw

from . import machine
from .timing import Plan, measure, paired_ratio, quartiles


@dataclasses.dataclass(frozen=True)
class Case:
    """A norm by its class and arguments, on an input of `shape`."""

    layer: str
    arguments: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        more = f", {self.arguments[0]} groups" if self.layer == "GroupNorm" else ""
        return f"{self.layer} {'x'.join(map(str, self.shape))}{more}"


CASES = (
    *(
        Case(layer, (shape[-1],), shape)
        for shape in ((2, 16), (8, 1024), (64, 128, 768), (4096, 4096))
        for layer in ("LayerNorm", "RMSNorm")
    ),
    Case("GroupNorm", (4, 16), (2, 16, 8, 8)),
    Case("GroupNorm", (32, 256), (8, 256, 14, 14)),
    Case("GroupNorm", (32, 64), (32, 64, 56, 56)),
    Case("InstanceNorm2d", (16,), (2, 16, 8, 8)),
    Case("InstanceNorm2d", (256,), (8, 256, 28, 28)),
)
PASSES = ("eval", "forward", "both")
_PLAN = Plan(budget=0.3, patience=0.8)


def build(library: object, case: Case) -> nn.Module:
    affine = {"affine": True} if case.layer.startswith("Instance") else {}
    layer: nn.Module = getattr(library, case.layer)(*case.arguments, **affine)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return layer


def call(layer: nn.Module, x: Tensor, dy: Tensor, what: str) -> Callable[[], object]:
    if what == "eval":

        def evaluate() -> Tensor:
            with torch.no_grad():
                y: Tensor = layer(x)
            return y

        return evaluate
    if what == "forward":
        return lambda: layer(x)
    inputs = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), inputs, dy)


def speedup(case: Case, dtype: torch.dtype, what: str) -> tuple[float, float, float]:
    """(torch.nn's time over ours, ours and torch.nn's in microseconds)."""
    x = torch.randn(case.shape).add_(0.5).to(dtype).requires_grad_()
    dy = torch.randn(case.shape).to(dtype)
    layers = {"torch": build(nn, case), "ours": build(nw.nn, case)}
    if dtype != torch.float32 and case.layer.startswith(("RMS", "Instance")):
        layers = {name: layer.to(dtype) for name, layer in layers.items()}  # torch.nn wants it
    calls = {name: call(layer, x, dy, what) for name, layer in layers.items()}
    # One thread: its own time, in which other programs do not count.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples = measure(calls, _PLAN, clock=clock)
    ratio = paired_ratio(samples["torch"].seconds, samples["ours"].seconds).median
    ours, theirs = (quartiles(samples[name].seconds).median * 1e6 for name in ("ours", "torch"))
    return ratio, ours, theirs


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.set_norms", description=__doc__)
    p.add_argument("--threads", type=int, default=2, metavar="N")
    p.add_argument("--filter", default="", metavar="TEXT", help="only cases with TEXT in the name")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), action="append")
    options = p.parse_args()
    torch.set_num_threads(options.threads)
    for key, value in machine.describe(options.threads).items():
        print(f"{key}: {value}")
    print("\n| case | dtype | eval | forward | forward + backward | µs, ours | µs, torch.nn |")
    print("|---|---|---|---|---|---|---|")
    ratios = []
    for case in CASES:
        for dtype in options.dtype or ("float32", "bfloat16"):
            if options.filter not in case.name:
                continue
            found = [speedup(case, getattr(torch, dtype), what) for what in PASSES]
            ratios += [ratio for ratio, _, _ in found]
            cells = [f"{ratio:.2f}" for ratio, _, _ in found]
            times = [f"{found[-1][k]:.0f}" for k in (1, 2)]
            print(f"| {case.name} | {dtype} | {' | '.join([*cells, *times])} |", flush=True)
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"\ngeometric mean {mean:.2f}, least {min(ratios):.2f}")


if __name__ == "__main__":
    main()
