"""conv -> bn -> relu against conv -> relu -> bn, once the batch norms are folded and int8 comes.

Run: python examples/quantization_order.py [--seeds 5] [--epochs 12] [--widen 30]

Trains both orders on scikit-learn's digits, folds them, and prints for each seed the accuracy in
float32 and in simulated int8 (weights per tensor and per channel, activations per tensor) and the
signal-to-noise ratio of the logits; then the same once more after equalize(). The last lines are of
the first order with a tenth of the channels of each norm times --widen and the next weights on them
divided by it: the same function, and weights whose range a few channels take.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.demo.data import Digits, load_digits
from normwise.tools.quantization import simulate_int8

WIDTHS = (1, 32, 32, 64)


def network(order: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for stage, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
        conv = nn.Conv2d(inputs, outputs, 3, 2 if stage else 1, 1, bias=order != "bn relu")
        tail: list[nn.Module] = [nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [conv, *(tail if order == "bn relu" else tail[::-1])]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * WIDTHS[-1], 10))


def trained(order: str, digits: Digits, epochs: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = network(order)
    images = digits.train_images.view(-1, 1, 8, 8)
    steps = epochs * (len(images) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: len(images) // 64 * 64].split(64):
            loss = nn.functional.cross_entropy(model(images[rows]), digits.train_classes[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def widened(model: nn.Sequential, factor: float) -> nn.Sequential:
    """The same function: channels of a norm times ``factor``, the next weights divided by it."""
    model = copy.deepcopy(model)
    norms = [i for i, m in enumerate(model) if isinstance(m, nn.BatchNorm2d)]
    for i in norms:
        norm, chosen = model[i], slice(0, model[i].num_features // 10)
        norm.weight[chosen] *= factor
        norm.bias[chosen] *= factor
        following = next(m for m in model[i + 1 :] if isinstance(m, (nn.Conv2d, nn.Linear)))
        following.weight.view(len(following.weight), norm.num_features, -1)[:, chosen] /= factor
    return model


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    right = model(digits.test_images.view(-1, 1, 8, 8)).argmax(1) == digits.test_classes
    return 100 * right.double().mean().item()


def measure(model: nn.Module, digits: Digits, calibration: Tensor) -> list[float]:
    """Of a folded model: accuracies, then decibels."""
    report = nw.quantization_report(model, calibration)
    return [
        accuracy(model, digits),
        *(
            accuracy(simulate_int8(model, calibration, per_channel=p), digits)
            for p in (False, True)
        ),
        report.facts["snr_tensor"],
        report.facts["snr_channel"],
    ]


def line(name: str, figures: list[float]) -> str:
    return f"{name:44}" + "".join(f"{f:10.2f}" for f in figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--widen", type=float, default=30.0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the same sums whatever the machine: the figures can be repeated
    rows: dict[str, list[list[float]]] = {}
    folded: dict[str, nn.Module] = {}
    print(f"{'':44}{'accuracy in %':>30}{'SNR in dB':>20}")
    columns = ("float32", "tensor", "channel", "tensor", "channel")
    print(f"{'order, seed':44}" + "".join(f"{c:>10}" for c in columns))
    for seed in range(options.seeds):
        digits = load_digits(1200, 597, seed)
        calibration = digits.train_images[:256].view(-1, 1, 8, 8)
        models = {o: trained(o, digits, options.epochs, seed) for o in ("bn relu", "relu bn")}
        models[f"bn relu, widened x {options.widen:g}"] = widened(models["bn relu"], options.widen)
        for name, model in models.items():
            folded[name] = nw.fold(model, calibration, seconds=0).model
            level = nw.equalize(folded[name], calibration).model
            for label, made in ((name, folded[name]), (f"{name}, equalized", level)):
                figures = measure(made, digits, calibration)
                rows.setdefault(label, []).append(figures)
                print(line(f"conv {label}, {seed}", figures))
    print()
    for label, all_figures in rows.items():
        print(
            line(
                f"conv {label}, mean", [statistics.mean(c) for c in zip(*all_figures, strict=True)]
            )
        )
    for name, model in models.items():
        print(f"\nthe layers of conv {name}, {seed}, before equalize():")
        print(nw.quantization_report(folded[name], calibration, original=model))


if __name__ == "__main__":
    main()
