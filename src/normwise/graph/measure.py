"""How large and how fast a model is, before and after."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from normwise.graph.run import Call, same_random_numbers

__all__ = ["latency", "multiply_adds", "size"]


def size(model: nn.Module) -> int:
    """Numbers in parameters and buffers, each tensor once."""
    seen = {id(t): t.numel() for t in (*model.parameters(), *model.buffers())}
    return sum(seen.values())


def multiply_adds(model: nn.Module, call: Call) -> int:
    """Of its convolutions and matrix products; a norm's own come on top."""
    with torch.no_grad(), same_random_numbers(), FlopCounterMode(display=False) as counter:
        call.copy().run(model)
    return int(counter.get_total_flops()) // 2


def latency(before: nn.Module, after: nn.Module, call: Call, seconds: float) -> tuple[float, float]:
    """Milliseconds of a forward, medians of runs in turn, for about ``seconds`` in all."""
    models = (before, after)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad(), same_random_numbers():
        for model in models:
            call.copy().run(model)
        end = time.perf_counter() + seconds
        while not times[1] or (time.perf_counter() < end and len(times[1]) < 101):
            for model, own in zip(models, times, strict=True):
                given = call.copy()
                start = time.perf_counter()
                given.run(model)
                own.append(1e3 * (time.perf_counter() - start))
    medians = [sorted(own)[len(own) // 2] for own in times]
    return medians[0], medians[1]
