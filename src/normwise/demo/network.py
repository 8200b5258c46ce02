"""The network of figure 1, with a normalization before each sigmoid or without one.

This is the one place of the demo that names the batch norms under comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..nn import BatchNorm1d
from .settings import Settings

__all__ = ["NORMS", "NORMWISE", "PLAIN", "TORCH", "Norm", "SigmoidNetwork"]

Norm = Callable[[int], nn.Module] | None
"""Makes the normalization of a layer of so many units; None for a network without."""

PLAIN, TORCH, NORMWISE = "none", "torch.nn", "normwise"
"""Which batch norm a network has; the names in the table, the picture and the JSON."""


def _torch_norm(units: int) -> nn.Module:
    return nn.BatchNorm1d(units, device="cpu", dtype=torch.float32)


def _normwise_norm(units: int) -> nn.Module:
    return BatchNorm1d(units, device="cpu", dtype=torch.float32)


NORMS: Mapping[str, Norm] = MappingProxyType(
    {PLAIN: None, TORCH: _torch_norm, NORMWISE: _normwise_norm}
)


class SigmoidNetwork(nn.Module):
    """64 inputs, hidden layers y = sigmoid(norm(W u + b)), and 10 outputs.

    The normalization stands before the sigmoid (paper, section 3.2), where its own shift makes
    the bias of the linear layer redundant; so only layers without a normalization have that bias.

    The weights are drawn from ``seed`` alone, so that networks that differ only in ``norm`` start
    from the same ones. (What ``nn.Linear`` draws from the global state before that is overwritten.)
    """

    def __init__(self, norm: Norm, settings: Settings, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            layer = nn.Linear(inputs, outputs, bias, device="cpu", dtype=torch.float32)
            nn.init.normal_(layer.weight, std=settings.weight_std, generator=generator)
            if bias:
                nn.init.zeros_(layer.bias)
            return layer

        layers: list[nn.Module] = []
        inputs = 64
        for _ in range(settings.hidden_layers):
            layers.append(linear(inputs, settings.hidden_units, bias=norm is None))
            if norm is not None:
                layers.append(norm(settings.hidden_units))
            layers.append(nn.Sigmoid())
            inputs = settings.hidden_units
        # All but the last sigmoid, so that what goes into it can be looked at.
        self.to_last_sigmoid = nn.Sequential(*layers[:-1])
        self.to_classes = nn.Sequential(layers[-1], linear(inputs, 10, bias=True))

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 64) to scores (N, 10)."""
        scores: Tensor = self.to_classes(self.to_last_sigmoid(images))
        return scores
