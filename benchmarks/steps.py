"""Whole training steps, as written and after ``nw.accelerate``: ``python -m benchmarks.steps``.

Forward, cross entropy, backward, SGD with momentum, of ResNet-50, MobileNetV2 and DenseNet-121 with
the same weights, batch after batch in turn, in contiguous and channels_last layout. Prints the
median time of each, the median of the ratios of neighbouring steps, and the largest relative
difference of the losses in the first two steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normwise as nw
from benchmarks.networks import NETWORKS

__all__ = ["Result", "main", "measure"]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WARM_UP = 2  # steps: the first allocates, and traces are made on the way


@dataclass(frozen=True)
class Result:
    """Seconds of a step, medians; ratio: the median of those of neighbouring steps, above 1 where
    the accelerated model is faster; quartiles of the same."""

    network: str
    layout: str
    plain: float
    accelerated: float
    ratio: float
    quartiles: tuple[float, float]
    losses: float

    def line(self) -> str:
        low, high = self.quartiles
        return (
            f"| {self.network} | {self.layout} | {self.plain * 1e3:.0f} | "
            f"{self.accelerated * 1e3:.0f} | **{self.ratio:.2f}** ({low:.2f} to {high:.2f}) | "
            f"{self.losses:.1e} |"
        )


class _Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """The loss, and the seconds that the step took."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach()), time.perf_counter() - start


def measure(network: str, layout: str, batch: int, size: int, rounds: int) -> Result:
    """``rounds`` steps of each after the warm-up; who goes first changes every round."""
    torch.manual_seed(0)
    form = LAYOUTS[layout]
    plain = NETWORKS[network]().to(memory_format=form)
    trainers = [_Trainer(plain), _Trainer(nw.accelerate(copy.deepcopy(plain)).model)]
    times: list[tuple[float, float]] = []
    apart = 0.0
    for i in range(WARM_UP + rounds):
        x = torch.randn(batch, 3, size, size).contiguous(memory_format=form)
        y = torch.randint(0, 1000, (batch,))
        order = (0, 1) if i % 2 else (1, 0)
        done = {k: trainers[k].step(x, y) for k in order}
        if i < WARM_UP:
            apart = max(apart, abs(done[0][0] - done[1][0]) / abs(done[0][0]))
        else:
            times.append((done[0][1], done[1][1]))
    ratios = [a / b for a, b in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Result(
        network,
        layout,
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(ratios),
        (low, high),
        apart,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--network", choices=list(NETWORKS), action="append")
    parser.add_argument("--tune-allocator", action="store_true", help="nw.tune_allocator() first")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.tune_allocator:
        nw.tune_allocator()
    print(
        "| network | layout | torch.nn, ms | accelerated, ms | ratio (quartiles) | losses apart |"
    )
    print("|---|---|---|---|---|---|")
    for network in arguments.network or NETWORKS:
        for layout in LAYOUTS:
            found = measure(network, layout, arguments.batch, arguments.size, arguments.rounds)
            print(found.line(), flush=True)


if __name__ == "__main__":
    main()
