"""A plain chain over the digits, and its exact statistics from float64 NumPy moments."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from oracle import Array, moments
from sklearn import datasets
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

IMAGES = torch.from_numpy(datasets.load_digits().images / 16).unsqueeze(1)  # (1797, 1, 8, 8)
CLASSES = torch.from_numpy(datasets.load_digits().target).long()


def chain(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Three norms in a row, none with its initial statistics or parameters."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.BatchNorm1d(10),
    ).to(dtype)
    with torch.no_grad():
        for t in model.state_dict().values():
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=g, dtype=torch.float64) - 0.4)
        for norm in norms(model).values():
            norm.running_var.add_(1)
    return model


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}


def split(data: Tensor, size: int) -> list[Tensor]:
    return list(data.split(size))


def exact_statistics(model: nn.Sequential, images: Tensor) -> dict[str, tuple[Array, Array]]:
    """Mean and unbiased variance that each norm of a chain sees over all images at once, given that
    the norms before it hold theirs. float64; norms and moments in NumPy."""
    found, h = {}, images.double()
    for name, layer in model.named_children():
        if isinstance(layer, _BatchNorm):
            m = moments(h.numpy())
            found[name] = (m.mean, m.m2 / (m.count - 1))
            shape = [1, -1] + [1] * (h.dim() - 2)
            weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
            scale = weight / np.sqrt(found[name][1] + layer.eps)
            shift = bias - scale * m.mean
            h = torch.from_numpy(h.numpy() * scale.reshape(shape) + shift.reshape(shape))
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
            if isinstance(layer, nn.Conv2d):
                h = nn.functional.conv2d(h, weight, bias, layer.stride, layer.padding)
            else:
                h = nn.functional.linear(h, weight, bias)
        elif not isinstance(layer, nn.Dropout):
            h = layer(h)
    return found


def errors(model: nn.Module, expected: dict[str, tuple[Array, Array]]) -> Iterator[float]:
    """Of each norm the mean's error in standard deviations and the variance's, relative."""
    for name, norm in norms(model).items():
        mean, var = expected[name]
        yield float(np.abs((norm.running_mean.double().numpy() - mean) / np.sqrt(var)).max())
        yield float(np.abs(norm.running_var.double().numpy() / var - 1).max())
