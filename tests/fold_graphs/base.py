"""A table of small hard graphs for ``fold``: how a row is written, and its hard numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedTensorMixin

__all__ = ["Graph", "Net", "images", "normal", "randomise", "signals", "tokens", "vectors"]


@dataclass(frozen=True)
class Graph:
    """One row.

    expect: norm -> 'action' or 'action: reason'. inputs: the first is the example, the others are
    what the folded model must also get right. positive: all scales above zero.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Sequence[Any]]
    expect: Mapping[str, str]
    positive: bool = False
    dtype: torch.dtype | None = None
    """Of the model, where the graph is only defined in it; None for float64 and float32."""
    tolerance: float | None = None
    prepare: Callable[[Any], Any] | None = None
    """Last of all, after the numbers are drawn."""


class Net(nn.Module):
    """Modules by name, and a forward that is written where they are: ``run(net, *inputs)``."""

    def __init__(self, run: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _sizes(*shapes: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    return lambda: [normal(*s, seed=i + 1) * (1 + i) + i / 2 for i, s in enumerate(shapes)]


def images(c: int = 3, size: int = 8, other: int | None = None) -> Callable[[], list[Tensor]]:
    """Another batch size and, unless the graph fixes it, another height and width."""
    h, w = (size, size) if other is None else (other, other)
    if other is None:
        h, w = size + 4, size + 2
    return _sizes((2, c, size, size), (3, c, h, w), (1, c, size, size))


def signals(c: int = 3, length: int = 12, other: int = 17) -> Callable[[], list[Tensor]]:
    return _sizes((2, c, length), (3, c, other))


def vectors(c: int = 6) -> Callable[[], list[Tensor]]:
    return _sizes((4, c), (3, c), (1, c))


def tokens(high: int = 11, *shape: int) -> Callable[[], list[Tensor]]:
    shape = shape or (2, 5)

    def make() -> list[Tensor]:
        rng = torch.Generator().manual_seed(5)
        return [torch.randint(high, (shape[0] + i, *shape[1:]), generator=rng) for i in range(2)]

    return make


@torch.no_grad()
def randomise(model: nn.Module, positive: bool = False) -> None:
    """Statistics and weights of every norm: means and variances of all sizes, scales of both signs
    (unless ``positive``), a tiny one; biases everywhere."""
    rng = torch.Generator().manual_seed(20150211)

    def rand(t: Tensor) -> Tensor:
        return torch.rand(t.shape, generator=rng, dtype=torch.float64)

    for module in model.modules():
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is None or isinstance(t, UninitializedTensorMixin) or not t.is_floating_point():
                continue
            norm = isinstance(module, _BatchNorm)
            if name == "running_mean":
                t.copy_(4 * rand(t) - 2)
            elif name == "running_var":
                t.copy_(10 ** (2 * rand(t) - 1))
            elif name in ("weight", "original") and (norm or t.dim() == 1):
                scale = 0.3 + rand(t)
                if not positive:
                    scale *= (-1.0) ** torch.arange(t.numel())
                if t.numel() > 2:
                    scale[2] = 1e-4
                t.copy_(scale.view(t.shape))
            elif name.endswith("bias") and t.dim() == 1:
                t.copy_(2 * rand(t) - 1)
