"""The five pictures of ``normwise.plots``, as docs/plots.md shows them.

python examples/pictures.py --out docs/images
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import normwise as nw
from normwise.demo.data import load_digits


def watched(steps: int) -> nw.tools.watch.WatchRecord:
    """The digits, as 8 x 8 images, in three convolutions; the learning rate is high on purpose."""
    data = load_digits(1500, 297, seed=0)
    images = data.train_images.reshape(-1, 1, 8, 8)
    torch.manual_seed(0)
    model = nn.Sequential()
    for i, (inputs, outputs) in enumerate(((1, 8), (8, 16), (16, 16)), 1):
        model.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        model.add_module(f"bn{i}", nw.nn.BatchNorm2d(outputs, activation="relu"))
    for i, module in enumerate((nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))):
        model.add_module(f"head{i}", module)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    with nw.watch(model, every=5) as record:
        for _ in range(steps):
            batch = torch.randint(len(images), (32,))
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), data.train_classes[batch]).backward()
            optimizer.step()
    return record


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--steps", type=int, default=400, help="of the training that is watched")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, draw in {
        "input_histogram": nw.plots.input_histogram,
        "norm_cubes": nw.plots.norm_cubes,
        "momentum_chase": nw.plots.momentum_chase,
        "activation_map": nw.plots.activation_map,
        "percentiles": lambda path: nw.plots.percentiles(watched(options.steps), path=path),
    }.items():
        draw(path=options.out / f"{name}.png")
        print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
