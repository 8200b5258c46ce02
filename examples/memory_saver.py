"""What memory_saver() saves and costs: a training step of a ResNet-50.

Run: python examples/memory_saver.py [--batch 4] [--size 96] [--width 64] [--rounds 5]

Prints, with and without memory_saver(): the bytes that autograd holds after the forward (distinct
storages that the step made), the largest amount during the backward (gradients
included), and the time of a step; and whether all gradients are equal bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normwise as nw
from normwise import memory_saver


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nw.nn.BatchNorm2d(width, activation="relu")
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nw.nn.BatchNorm2d(width, activation="relu")
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nw.nn.BatchNorm2d(outputs, activation="relu")
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nw.nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.bn3(self.conv3(out), residual=self.shortcut(x))


def resnet(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> nn.Sequential:
    """ResNet-50 (He et al. 2016, stride in the 3 x 3 convolution) with fused norms."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nw.nn.BatchNorm2d(width, activation="relu"),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Bottleneck(inputs, width << stage, stride))
            inputs = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class Storages(TorchDispatchMode):
    """Bytes of the distinct storages that operations made in this block and that are alive;
    those of the model and its input, which were there before, are not counted."""

    def __init__(self, model: nn.Module, *inputs: Tensor) -> None:
        super().__init__()
        before = (*model.state_dict().values(), *inputs)
        self.before = {t.untyped_storage()._cdata for t in before}
        self.made: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = len(self.made)
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata in self.before:
                    continue
                # A weak reference keeps the key from being used again.
                weak = torch.multiprocessing.reductions.StorageWeakRef(storage)
                self.made[storage._cdata] = (weak, storage.nbytes())
        if len(self.made) > before:
            self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        self.made = {k: v for k, v in self.made.items() if not v[0].expired()}
        return sum(nbytes for _, nbytes in self.made.values())


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


def step(model: nn.Module, x: Tensor, target: Tensor, save: bool) -> tuple[int, int, list[Tensor]]:
    """One forward and backward: (bytes after the forward, peak of the backward, gradients)."""
    model.zero_grad()
    with Storages(model, x, target) as storages:
        with memory_saver() if save else nothing():
            loss = nn.functional.cross_entropy(model(x), target)
        gc.collect()
        after_forward = storages.alive()
        storages.peak = 0
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return after_forward, storages.peak, gradients


def seconds(model: nn.Module, x: Tensor, target: Tensor, save: bool) -> float:
    model.zero_grad()
    start = time.perf_counter()
    with memory_saver() if save else nothing():
        loss = nn.functional.cross_entropy(model(x), target)
    loss.backward()
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = resnet(width=options.width)
    x = torch.randn(options.batch, 3, options.size, options.size)
    target = torch.randint(10, (options.batch,))

    plain_bytes, plain_peak, plain = step(model, x, target, False)
    saved_bytes, saved_peak, saved = step(model, x, target, True)
    equal = all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))
    # Interleaved, so that whatever else the machine does meets both alike.
    times = [
        [seconds(model, x, target, save) for save in (False, True)] for _ in range(options.rounds)
    ]
    print(f"ResNet-50, batch {options.batch}, {options.size} px, {torch.get_num_threads()} threads")
    for name, a, b in (
        ("held after the forward", plain_bytes, saved_bytes),
        ("peak of the backward", plain_peak, saved_peak),
    ):
        print(f"{name:<24}{a / 1e6:8.1f} MB  ->{b / 1e6:8.1f} MB  ({b / a - 1:+.0%})")
    result = {"forward": saved_bytes / plain_bytes, "peak": saved_peak / plain_peak, "equal": equal}
    if times:
        ratios = sorted(b / a for a, b in times)
        fastest = [min(column) for column in zip(*times, strict=True)]
        print(
            f"time of a step          x {statistics.median(ratios):.2f} "
            f"(median of {len(ratios)} pairs, {ratios[0]:.2f} to {ratios[-1]:.2f}); "
            f"fastest {fastest[0]:.3f} s -> {fastest[1]:.3f} s (x {fastest[1] / fastest[0]:.2f})"
        )
    print(f"gradients equal bit for bit: {equal}")
    return result


if __name__ == "__main__":
    main()
