"""Which norm at which batch size: a small network on the digits, as figure 1 of the group norm
paper (Wu & He 2018) shows it for ImageNet.

    python examples/batch_size.py --seeds 3 --out batch_size.png

Each network sees the same number of images. The learning rate grows with the batch, as in the paper
(section 4.1), from 0.1 at 32 images; the accuracy is that on images it has not seen.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import normwise as nw
from normwise.demo.data import Digits, load_digits

SIZES = (2, 4, 8, 16, 32, 64, 128)
# (channels, steps of the training) -> the norm.
Norm = Callable[[int, int], nn.Module]
NORMS: dict[str, Norm] = {
    "batch": lambda c, steps: nw.nn.BatchNorm2d(c),
    "ghost": lambda c, steps: nw.nn.GhostBatchNorm(c, ghost_size=16),
    # The paper's schedule (Ioffe 2017, section 4), in parts of the training.
    "renorm": lambda c, steps: nw.nn.BatchRenorm(c, schedule=(steps // 32, steps // 4, steps // 6)),
    "group": lambda c, steps: nw.nn.GroupNorm(4, c),
    "layer": lambda c, steps: nw.nn.GroupNorm(1, c),  # over all of a sample, as for images
    "none": lambda c, steps: nn.Identity(),
}


def network(norm: Norm, steps: int) -> nn.Sequential:
    """Four convolutions over 8 x 8 images, each with a norm."""
    layers: list[nn.Module] = []
    before = 1
    for channels, stride in ((16, 1), (16, 1), (32, 2), (32, 1)):
        normalize = norm(channels, steps)
        bias = isinstance(normalize, nn.Identity)
        layers += [nn.Conv2d(before, channels, 3, stride, 1, bias=bias), normalize, nn.ReLU()]
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def images(x: Tensor) -> Tensor:
    return x.view(-1, 1, 8, 8)


def accuracy(net: nn.Module, digits: Digits) -> float:
    net.eval()
    with torch.no_grad():
        right = net(images(digits.test_images)).argmax(1) == digits.test_classes
    return right.double().mean().item()


def train(norm: Norm, batch: int, seed: int, epochs: int) -> float:
    """The accuracy after ``epochs`` at this batch size."""
    digits = load_digits(1200, 597, seed)
    torch.manual_seed(seed)
    steps = epochs * (len(digits.train_images) // batch)
    net = network(norm, steps).train()
    rate = 0.1 * batch / 32
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.2
    )
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_images))
        for chosen in order.split(batch):
            if len(chosen) < batch:  # one image left alone has no variance to speak of
                continue
            loss = cross_entropy(
                net(images(digits.train_images[chosen])), digits.train_classes[chosen]
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    return accuracy(net, digits)


def draw(results: dict[str, list[list[float]]], path: Path) -> None:
    """Error against batch size, one curve a norm; the band reaches from best to worst seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in results.items():
        error = [100 * (1 - statistics.mean(r)) for r in rows]
        low = [100 * (1 - max(r)) for r in rows]
        high = [100 * (1 - min(r)) for r in rows]
        (line,) = axes.plot(SIZES, error, marker="o", label=name)
        axes.fill_between(SIZES, low, high, alpha=0.15, color=line.get_color(), lw=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(s) for s in SIZES])
    axes.invert_xaxis()  # as in the paper: towards small batches
    axes.set_yscale("log")
    axes.set_xlabel("images per batch")
    axes.set_ylabel("test error, %")
    axes.grid(color="#DDDDDD", which="both", lw=0.5)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="runs for each norm and size")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=list(NORMS))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--out", type=Path, help="where the picture goes; all sizes are needed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the images are so small that a second thread waits for the first

    print("test accuracy in %, mean over seeds\n")
    print("norm".ljust(8) + "".join(f"{size:>8}" for size in arguments.sizes))
    results: dict[str, list[list[float]]] = {}
    for name in arguments.norms:
        rows = results[name] = []
        print(name.ljust(8), end="", flush=True)
        for size in arguments.sizes:
            runs = range(arguments.seeds)
            rows.append([train(NORMS[name], size, seed, arguments.epochs) for seed in runs])
            print(f"{100 * statistics.mean(rows[-1]):8.1f}", end="", flush=True)
        print()
    if arguments.out is not None and tuple(arguments.sizes) == SIZES:
        draw(results, arguments.out)
        print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
