"""The images: scikit-learn's handwritten digits, which ship inside that package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Digits", "load_digits"]


@dataclass(frozen=True)
class Digits:
    """Images (N, 64) float32 in [0, 1] and their classes (N,) int64, split in two."""

    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor


def load_digits(train_images: int, test_images: int, seed: int) -> Digits:
    """The 1,797 8x8 images, shuffled by ``seed`` and cut into those to train on and to test on."""
    from sklearn import datasets

    images, classes = datasets.load_digits(return_X_y=True)
    # The scanner's grey levels are 0..16; the paper's inputs lie in [0, 1] too.
    x = torch.from_numpy(images).to(torch.float32) / 16
    y = torch.from_numpy(classes).to(torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed), device="cpu")
    train, test = order[:train_images], order[train_images:][:test_images]
    return Digits(x[train], y[train], x[test], y[test])
