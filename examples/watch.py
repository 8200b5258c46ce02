"""Watch the norms of the digits network through training, and what that costs.

    python examples/watch.py --steps 1000 --every 20 --rows watch.jsonl --picture watch.png
    python examples/watch.py --cost 20

Prints the report; writes the rows as JSON lines and the percentiles of the inputs as a picture.
``--cost`` measures steps without watch, with it between measured steps, and measured ones, in turn,
for the digits network (batch 60) and a ResNet-18 (8 images of 64 x 64), on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

import normwise as nw
from normwise.demo.data import load_digits


def digits_network() -> nn.Sequential:
    """64 inputs, three hidden layers of 100 sigmoids with a norm before each, 10 outputs."""
    layers: list[nn.Module] = []
    for inputs in (64, 100, 100):
        layers += [nn.Linear(inputs, 100, bias=False), nw.nn.BatchNorm1d(100), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


class Block(nn.Module):
    """The basic block of He et al. 2016, section 3."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.skip = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(y + self.skip(x))


def resnet18() -> nn.Sequential:
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    blocks = [
        Block(inputs, outputs, stride)
        for a, b, s in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        for inputs, outputs, stride in ((a, b, s), (b, b, 1))
    ]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, classes: Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(model(x), classes).backward()
    optimizer.step()


def seconds(work: Callable[[], None]) -> float:
    """Of this thread's processor time: whatever else runs on the machine does not count."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def cost(name: str, model: nn.Module, x: Tensor, classes: Tensor, rounds: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def work() -> None:
        step(model, optimizer, x, classes)

    for _ in range(3):
        work()
    times: dict[str, list[float]] = {"without": [], "between": [], "measured": []}
    for _ in range(rounds):
        times["without"].append(seconds(work))
        with nw.watch(model, every=10**6):
            work()  # is measured; the next one pays for its rows
            work()
            times["between"].append(seconds(work))
        with nw.watch(model, every=1):
            work()
            times["measured"].append(seconds(work))  # with the rows of the step before
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    print(f"{name}, {norms} norms, {rounds} rounds; milliseconds")
    for label, of in (("median", statistics.median), ("fastest", min)):
        plain, between, measured = (1e3 * of(found) for found in times.values())
        share, hook = (measured - plain) / plain, (between - plain) / plain
        print(
            f"  {label}: {plain:.3f} without, {between:.3f} between measured steps ({hook:+.1%}), "
            f"{measured:.3f} measured ({share:+.0%}: {share / 100:+.2%} with every=100)"
        )


def main(arguments: list[str] | None = None) -> nw.tools.watch.WatchRecord | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rows", help="a .jsonl or .parquet file")
    parser.add_argument("--picture", help="a .png, .svg or .pdf file")
    parser.add_argument("--cost", type=int, metavar="ROUNDS", help="measure the cost instead")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.cost:
        torch.set_num_threads(1)
        x, classes = torch.rand(60, 64), torch.randint(10, (60,))
        cost("digits network", digits_network(), x, classes, 20 * options.cost)
        x, classes = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
        cost("ResNet-18", resnet18(), x, classes, options.cost)
        return None
    data = load_digits(1500, 297, seed=0)
    model = digits_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    with nw.watch(model, every=options.every, path=options.rows) as record:
        for _ in range(options.steps):
            batch = torch.randint(len(data.train_images), (60,))
            step(model, optimizer, data.train_images[batch], data.train_classes[batch])
        model.eval()
        with torch.no_grad():
            right = model(data.test_images).argmax(1) == data.test_classes
    print(record)
    print(f"test accuracy {right.double().mean():.1%}")
    if options.picture:
        nw.plots.percentiles(record, path=options.picture)
    return record


if __name__ == "__main__":
    main()
