"""One page of what four tools say of one small net on the digits.

Run: python examples/report.py [--steps 200] [--out report.html]

Trains a convolutional net on scikit-learn's handwritten digits, freezes one norm too early (its
statistics stay those of step 20) and lets a batch with an infinite pixel into another; then checks
the net, recalibrates it, checks again, folds the norms away, measures int8, and writes one page.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.report import save


def digits(seed: int) -> tuple[Tensor, Tensor]:
    from sklearn import datasets

    images, classes = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    return x[order], torch.from_numpy(classes).long()[order]


def network() -> nn.Sequential:
    widths = (1, 16, 16, 32, 32)
    blocks = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        conv = nn.Conv2d(a, b, 3, stride=2 if i == 2 else 1, padding=1, bias=False)
        blocks.append((f"block{i + 1}", nn.Sequential(conv, nn.BatchNorm2d(b), nn.ReLU())))
    net = nn.Sequential()
    for name, block in blocks:
        net.add_module(name, block)
    net.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(512, 10)))
    return net


def train(x: Tensor, y: Tensor, steps: int, seed: int) -> nn.Sequential:
    """With the statistics of ``block4`` frozen after a tenth of the steps."""
    torch.manual_seed(seed)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        if step == steps // 10:
            net.block4[1].eval()
        batch = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    options = parser.parse_args(arguments)
    x, y = digits(options.seed)
    net = train(x[:1400], y[:1400], options.steps, options.seed)

    poisoned = x[:64].clone()
    poisoned[0, 0, 4, 4] = torch.inf
    with torch.no_grad():
        net.block1(poisoned)  # in training mode: the statistics of block1 are gone
    net.eval()

    data = list(x[:1400].split(128))
    before = nw.check(net, data)
    recalibrated = nw.recalibrate(net, data)
    after = nw.check(recalibrated.model, data)
    folded = nw.fold(recalibrated.model, x[:64])
    int8 = nw.quantization_report(folded.model, x[:256], original=recalibrated.model)

    title = "A net on the digits: check, recalibrate, check, fold, int8"
    save(options.out, before, recalibrated, after, folded, int8, title=title)
    print(f"{len(before.findings)} findings before, {len(after.findings)} after: {options.out}")
    return options.out


if __name__ == "__main__":
    main()
