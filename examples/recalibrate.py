"""Statistics that drifted, and what recalibration makes of them: a small net on the digits.

Run: python examples/recalibrate.py [--steps 300] [--seed 0]

Trains a convolutional net on scikit-learn's handwritten digits, then lets its running statistics
drift in three ways, and prints the test loss and accuracy before and after recalibration:
- the average of the weights of many steps (SWA), with the statistics of the last weights;
- a domain that is darker than the training images (AdaBN: the new domain's statistics);
- a batch with an infinite pixel, which poisons torch.nn's running statistics for good.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn import datasets

    images, classes = datasets.load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    y = torch.from_numpy(classes).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[:1400]], y[order[:1400]], x[order[1400:]], y[order[1400:]]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(512, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def train(x: Tensor, y: Tensor, steps: int, seed: int) -> tuple[nn.Module, nn.Module]:
    """(the model, the average of its weights over the last half of the steps)."""
    torch.manual_seed(seed)
    model = network()
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        batch = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps // 2 and step % 5 == 0:
            average.update_parameters(model)
    return model, average.module


def measure(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    model.eval()
    with torch.no_grad():
        output = model(x)
    loss = nn.functional.cross_entropy(output, y)
    return float(loss), float((output.argmax(1) == y).double().mean())


def main(arguments: list[str] | None = None) -> dict[str, tuple[tuple[float, float], ...]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    x, y, test_x, test_y = digits(options.seed)
    model, averaged = train(x, y, options.steps, options.seed)
    training_data = DataLoader(TensorDataset(x, y), batch_size=128)

    poisoned = copy.deepcopy(model).train()
    bad = x[:64].clone()
    bad[0, 0, 4, 4] = torch.inf
    with torch.no_grad():
        poisoned(bad)

    dark_x = 0.4 * test_x  # the new domain: its images are there, its classes need not be
    cases = {
        "averaged weights": (averaged, training_data, test_x),
        "a darker domain": (model, [dark_x], dark_x),
        "poisoned by one batch": (poisoned, training_data, test_x),
    }
    loss, accuracy = measure(model, test_x, test_y)
    print(f"{'as trained':<24}loss {loss:8.3f}   accuracy {accuracy:.3f}")
    rows = {}
    for name, (drifted, data, images) in cases.items():
        result = nw.recalibrate(drifted, data)
        before, after = (measure(m, images, test_y) for m in (drifted, result.model))
        print(
            f"{name:<24}loss {before[0]:8.3f} -> {after[0]:.3f}   "
            f"accuracy {before[1]:.3f} -> {after[1]:.3f}"
        )
        rows[name] = (before, after)
        if name == "a darker domain":
            report = result.report
    print(f"\nThe report of the darker domain:\n{report}")
    return rows


if __name__ == "__main__":
    main()
