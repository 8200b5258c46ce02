"""What the doctor finds on a damaged network of the digits, and what repair makes of it.

Run: python examples/doctor.py [--epochs 6] [--seed 0]

Trains a convolutional net on scikit-learn's handwritten digits and damages it in four ways that
happen in practice. Prints for each the test accuracy, what `nw.check` says of it, and the accuracy
after `nw.repair`:
- one batch with an infinite pixel was in the training data;
- the checkpoint was loaded without its buffers (`strict=False`);
- the layers came from Keras with its momentum of 0.99, and fine-tuning ended on odd images;
- the statistics were reset, and training stopped ten batches later.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn import datasets

    images, classes = datasets.load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    y = torch.from_numpy(classes).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[:1408]], y[order[:1408]], x[order[1408:]], y[order[1408:]]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def train(model: nn.Module, data: DataLoader[tuple[Tensor, ...]], epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((copy.deepcopy(model).eval()(x).argmax(1) == y).double().mean())


def infinite_pixel(model: nn.Module, x: Tensor) -> nn.Module:
    bad = x[:64].clone()
    bad[0, 0, 4, 4] = torch.inf
    model.train()(bad)
    return model


def without_buffers(model: nn.Module, x: Tensor) -> nn.Module:
    loaded = network()
    loaded.load_state_dict(dict(model.named_parameters()), strict=False)
    return loaded


def other_momentum(model: nn.Module, x: Tensor) -> nn.Module:
    for norm in norms(model):
        norm.momentum = 0.99
    model.train()(0.4 * x[:64])
    return model


def stopped_early(model: nn.Module, x: Tensor) -> nn.Module:
    for norm in norms(model):
        norm.reset_running_stats()
    model.train()
    for batch in x[:640].split(64):
        model(batch)
    return model


DAMAGES: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "an infinite pixel": infinite_pixel,
    "no buffers": without_buffers,
    "Keras' momentum": other_momentum,
    "stopped early": stopped_early,
}


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float, set[str]]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    x, y, test_x, test_y = digits(options.seed)
    torch.manual_seed(options.seed)
    model = network()
    train(model, DataLoader(TensorDataset(x, y), 64, shuffle=True, drop_last=True), options.epochs)
    model.eval()
    data = DataLoader(TensorDataset(x), 64, drop_last=True)
    warnings = nw.check(model, data).at_least("warning")
    print(f"as trained: accuracy {accuracy(model, test_x, test_y):.3f}, {len(warnings)} warnings")
    rows = {}
    for name, damage in DAMAGES.items():
        with torch.no_grad():
            damaged = damage(copy.deepcopy(model), x).eval()
        report = nw.check(damaged, data)
        repaired, done = nw.repair(damaged, report, data=data, unsafe=True)
        before, after = (accuracy(m, test_x, test_y) for m in (damaged, repaired))
        print(f"\n{name}: accuracy {before:.3f} -> {after:.3f}")
        for finding, entry in zip(report.findings, done, strict=True):
            print(f"  {finding}\n    {entry.action}: {entry.facts.get('does', finding.remedy)}")
        rows[name] = (before, after, {f.code for f in report.findings})
    return rows


if __name__ == "__main__":
    main()
