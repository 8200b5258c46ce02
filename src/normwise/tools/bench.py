"""``bench``: normwise's norms against torch.nn's on this machine, for the shapes that one has.

Short and on the spot. The tables of docs/benchmarks.md come from ``make bench``, which also
measures the floor that memory sets.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normwise import nn as ours
from normwise.errors import InputError, message
from normwise.ops.backends import backends
from normwise.results import Entry, Report

__all__ = ["NORMS", "SHAPES", "BenchReport", "bench"]

SHAPES = ((32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7))
"""Of ResNet-50 at batch 32."""
SAMPLE = 1e-3
"""Seconds. A call that takes less is repeated until it takes as long: the clock reads in 1e-7."""
LEAST_ROUNDS = 5

Call = Callable[[], Any]


def _batch(library: Any, shape: Sequence[int], dtype: torch.dtype) -> nn.Module:
    kinds = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
    made: nn.Module = getattr(library, kinds[len(shape)])(shape[1], dtype=dtype)
    return made


def _layer(library: Any, shape: Sequence[int], dtype: torch.dtype) -> nn.Module:
    rows = shape[1:] if len(shape) > 3 else shape[-1:]
    made: nn.Module = library.LayerNorm(rows, dtype=dtype)
    return made


def _rms(library: Any, shape: Sequence[int], dtype: torch.dtype) -> nn.Module:
    rows = shape[1:] if len(shape) > 3 else shape[-1:]
    made: nn.Module = library.RMSNorm(rows, dtype=dtype)
    return made


def _group(library: Any, shape: Sequence[int], dtype: torch.dtype) -> nn.Module:
    made: nn.Module = library.GroupNorm(math.gcd(32, shape[1]), shape[1], dtype=dtype)
    return made


def _instance(library: Any, shape: Sequence[int], dtype: torch.dtype) -> nn.Module:
    kind = f"InstanceNorm{len(shape) - 2}d"
    made: nn.Module = getattr(library, kind)(shape[1], affine=True, dtype=dtype)
    return made


NORMS = {
    "batch": (_batch, 2),
    "layer": (_layer, 2),
    "group": (_group, 2),
    "instance": (_instance, 3),
    "rms": (_rms, 2),
}
"""How each is made, and how many axes it needs at least."""


class BenchReport(Report):
    """An entry for each shape and pass: ``name`` the shape, ``action`` the pass.

    Facts of an entry: ``torch_ms`` and ``normwise_ms``, medians; ``ratio``, the median over the
    rounds of torch / normwise (above 1: normwise is faster); ``rounds``; ``error``, the largest
    difference of the two results relative to the largest value.

    ``facts``: ``norm``, ``dtype``, ``layout``, ``threads``, ``torch``, ``backends``, ``tolerance``.
    """

    title: ClassVar[str] = "bench"
    columns: ClassVar[tuple[str, ...]] = ("torch_ms", "normwise_ms", "ratio", "rounds", "error")

    @property
    def passed(self) -> bool:
        """Whether the two agree everywhere. A difference that is not a number is one."""
        return all(e.facts["error"] <= self.facts["tolerance"] for e in self.entries)

    def summary(self) -> list[str]:
        f = self.facts
        threads = "1 thread" if f["threads"] == 1 else f"{f['threads']} threads"
        lines = [
            f"{f['norm']} norm, {f['dtype']}, {f['layout']}, {threads}, torch {f['torch']}, "
            f"backends: {', '.join(f['backends'])}"
        ]
        for name in dict.fromkeys(e.action for e in self.entries):
            ratios = [e.facts["ratio"] for e in self.entries if e.action == name]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines.append(f"{name}: {mean:.2f} times as fast as torch.nn (geometric mean)")
        if not self.passed:
            lines.append(f"THE TWO DISAGREE: by more than {f['tolerance']:.0e} of the largest")
        return lines


def bench(
    shapes: Sequence[Sequence[int]] = SHAPES,
    *,
    norm: str = "batch",
    dtype: str = "float32",
    channels_last: bool = False,
    seconds: float = 1.0,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BenchReport:
    """Time normwise's norm against torch.nn's, in turn, on the same tensors.

    The two take turns in every round, and who goes first changes, so that a busy neighbour meets
    both alike; ratios are formed within a round. First it is seen that they agree.

    Args:
        shapes: of the inputs, channels on axis 1 (``'layer'`` and ``'rms'``: the last axis of
            three or fewer, else all but the first).
        norm: one of :data:`NORMS`.
        dtype: of input and parameters, ``'float32'`` for instance.
        channels_last: memory in the order N, H, W, C (four axes) or N, D, H, W, C (five).
        seconds: for each shape and pass, about.
        threads: torch's, given back as they were; None leaves them.
        progress: called as ``progress(done, of)``.

    Returns:
        BenchReport: times, ratios, and how far the results were apart.

    Raises:
        InputError: a shape that the norm or the layout does not take.

    Example:
        >>> from normwise.tools.bench import bench
        >>> report = bench([(8, 4, 5, 5)], seconds=0.01)
        >>> [entry.action for entry in report]
        ['forward', 'forward and backward', 'eval']
        >>> report.passed
        True
    """
    for shape in shapes:
        _check(shape, norm, channels_last)
    own = getattr(torch, dtype)
    before = torch.get_num_threads()
    entries: list[Entry] = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            used = torch.get_num_threads()
            for shape in shapes:
                for name, calls in _passes(shape, norm, own, channels_last).items():
                    if progress is not None:
                        progress(len(entries), 3 * len(shapes))
                    facts = {**_time(calls, seconds), "error": _apart(calls)}
                    entries.append(Entry("x".join(map(str, shape)), name, facts=facts))
        finally:
            torch.set_num_threads(before)
    return BenchReport(
        entries,
        {
            "norm": norm,
            "dtype": dtype,
            "layout": "channels_last" if channels_last else "contiguous",
            "threads": used,
            "torch": torch.__version__,
            "backends": [str(name) for name in backends()],
            # Half of the dtype's digits: the two sum in different orders.
            "tolerance": float(torch.finfo(own).eps) ** 0.5,
        },
    )


def _check(shape: Sequence[int], norm: str, channels_last: bool) -> None:
    text = "x".join(map(str, shape))
    if norm not in NORMS:
        raise InputError(message(f"norm is one of {', '.join(NORMS)}", repr(norm), "norm='batch'"))
    least = 4 if channels_last else NORMS[norm][1]
    if not least <= len(shape) <= 5 or min(shape) < 1:
        raise InputError(
            message(
                f"a shape for {norm} norm{' in channels_last' if channels_last else ''} has "
                f"{least} to 5 axes, none of them empty",
                text,
                "32x64x56x56",
            )
        )
    values = math.prod(shape) // shape[1] if norm == "batch" else math.prod(shape[2:])
    if values < 2 and norm in ("batch", "instance"):
        raise InputError(
            message("a channel has two values or more", f"{values} in {text}", "32x64x56x56")
        )


def _passes(
    shape: Sequence[int], norm: str, dtype: torch.dtype, channels_last: bool
) -> dict[str, tuple[Call, Call]]:
    """Of each pass the call of torch.nn and that of normwise."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}
    form = layout[len(shape)] if channels_last else torch.contiguous_format
    x, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=form) for _ in range(2))
    x.requires_grad_()
    make = NORMS[norm][0]
    pair = [make(library, shape, dtype) for library in (nn, ours)]
    evals = [make(library, shape, dtype).eval() for library in (nn, ours)]

    def forward(module: nn.Module) -> Call:
        return lambda: module(x)

    def both(module: nn.Module) -> Call:
        wanted = (x, *module.parameters())
        return lambda: torch.autograd.grad(module(x), wanted, dy)

    def inference(module: nn.Module) -> Call:
        def call() -> Tensor:
            with torch.no_grad():
                y: Tensor = module(x)
            return y

        return call

    return {
        "forward": (forward(pair[0]), forward(pair[1])),
        "forward and backward": (both(pair[0]), both(pair[1])),
        "eval": (inference(evals[0]), inference(evals[1])),
    }


def _apart(calls: tuple[Call, Call]) -> float:
    """The largest difference of what the two give, relative to the largest value of each tensor."""
    theirs, mine = ([t] if isinstance(t, Tensor) else t for t in (call() for call in calls))
    worst = 0.0
    for a, b in zip(theirs, mine, strict=True):
        a, b = a.detach().double(), b.detach().double()
        apart = ((a - b).abs().max() / a.abs().max().clamp_min(1e-300)).item()
        worst = apart if not apart <= worst else worst
    return worst


def _loop(call: Call, times: int) -> float:
    """Seconds a call."""
    start = perf_counter()
    for _ in range(times):
        call()
    return (perf_counter() - start) / times


def _time(calls: tuple[Call, Call], seconds: float) -> dict[str, Any]:
    for call in calls:  # what is made on a first call
        call()
    times = [max(1, math.ceil(SAMPLE / max(_loop(call, 1), 1e-9))) for call in calls]
    taken: tuple[list[float], list[float]] = ([], [])
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall on one of the two
    try:
        end = perf_counter() + seconds
        while perf_counter() < end or len(taken[0]) < LEAST_ROUNDS:
            order = (0, 1) if len(taken[0]) % 2 else (1, 0)
            for i in order:
                taken[i].append(_loop(calls[i], times[i]))
    finally:
        if collecting:
            gc.enable()
    ratios = [a / b for a, b in zip(*taken, strict=True)]
    return {
        "torch_ms": 1e3 * median(taken[0]),
        "normwise_ms": 1e3 * median(taken[1]),
        "ratio": median(ratios),
        "rounds": len(ratios),
    }
