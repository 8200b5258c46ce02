"""Timing several calls against one another on a machine that other work shares.

Contenders take turns inside every round, so that a busy neighbour, a changed clock frequency or a
warm cache meets all of them alike, and ratios are formed within a round before the median is taken.
Measured with one contender against itself (84 cases on two cores, in groups by size and regime),
nine in ten medians of paired ratios were within 2.4 to 5.2 % of 1, and nine in ten ratios of
medians within 2.9 to 8.4 %.  With a neighbour that kept one core busy, on calls below 100 KB: 12 to
25 % for paired ratios, and a factor of 1.2 to 2.4 for ratios of medians.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to measure one case.

    `sample` is the least time between two readings of the clock: a call that takes less is put in a
    loop until the sum takes that long, so neither the timer's resolution nor the loop counts.
    Rounds go on until `budget` seconds are spent, and past that until the medians have settled to
    `tolerance` (see `unsettled`) or `patience` seconds are spent.  There are at least
    `least_rounds` of them and at most `most_rounds`.
    """

    sample: float = 0.5e-3
    budget: float = 0.3
    patience: float = 1.5
    tolerance: float = 0.02
    least_rounds: int = 8
    most_rounds: int = 200
    warmup: float = 5e-3


@dataclasses.dataclass
class Samples:
    """What was read for one contender, one entry a round."""

    inner: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    page_faults: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Quartiles:
    q1: float
    median: float
    q3: float


def quartiles(values: Sequence[float]) -> Quartiles:
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Quartiles:
    """Quartiles of ``above[i] / below[i]`` over the rounds i."""
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


def balanced_orders(n: int) -> list[list[int]]:
    """Orders of n contenders in which each comes right after each other one equally often.

    Merely rotating one order keeps everybody's predecessor, and with it what that predecessor left
    in the caches.  This is a Williams design (Austral. J. Sci. Res. A 2, 149, 1949): zigzag through
    0 … n-1, shift it by 0 … n-1, and where n is odd add every row backwards.
    """
    zigzag = [(i + 1) // 2 if i % 2 else (n - i // 2) % n for i in range(n)]
    rows = [[(step + shift) % n for step in zigzag] for shift in range(n)]
    return rows + [row[::-1] for row in rows] if n % 2 and n > 1 else rows


def minor_faults() -> int:
    """Pages that the kernel has had to map for this process so far, on all of its threads."""
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(
    calls: Mapping[str, Call],
    plan: Plan,
    *,
    clock: Callable[[], float] = time.perf_counter,
    faults: Callable[[], int] = minor_faults,
) -> dict[str, Samples]:
    """Time every call, in rounds in which each has its turn."""
    cost = {name: _warm_up(call, plan, clock) for name, call in calls.items()}
    samples = {name: Samples(max(1, math.ceil(plan.sample / cost[name]))) for name in calls}
    names, orders = list(calls), balanced_orders(len(calls))
    start = clock()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(plan.most_rounds):
            spent = clock() - start
            if turn >= plan.least_rounds and (
                spent >= plan.patience
                or (spent >= plan.budget and unsettled(samples.values()) <= plan.tolerance)
            ):
                break
            for index in orders[turn % len(orders)]:
                _sample(calls[names[index]], samples[names[index]], clock, faults)
    finally:
        if collecting:
            gc.enable()
    return samples


def unsettled(samples: Collection[Samples]) -> float:
    """Relative uncertainty of the least certain contender's median.

    That is the interquartile range over the median and the root of the number of rounds, of the
    contender's share of its round: what slows a whole round down does not count.
    """
    rounds = [sum(times) for times in zip(*(each.seconds for each in samples), strict=True)]
    shares = [paired_ratio(each.seconds, rounds) for each in samples]
    return max((s.q3 - s.q1) / s.median for s in shares) / math.sqrt(len(rounds))


def _warm_up(call: Call, plan: Plan, clock: Callable[[], float]) -> float:
    """Seconds of one call, the least seen: an interrupted call would make the loop too short."""
    least, start = math.inf, clock()
    for _ in range(1000):
        before = clock()
        call()
        after = clock()
        least = min(least, after - before)
        if after - start >= plan.warmup:
            break
    return max(least, 1e-9)


def _sample(
    call: Call, into: Samples, clock: Callable[[], float], faults: Callable[[], int]
) -> None:
    turns = range(into.inner)
    faults_before = faults()
    before = clock()
    for _ in turns:
        call()
    after = clock()
    into.page_faults.append((faults() - faults_before) / into.inner)
    into.seconds.append((after - before) / into.inner)
