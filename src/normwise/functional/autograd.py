"""What the norms' autograd nodes share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normwise.activations import parse

__all__ = ["to_keep", "transformed"]


def to_keep(
    activation: str, residual: Tensor | None, y: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What the backward of a fused residual needs beside x: (residual, output), one or none.

    Without an activation nothing. Under relu, relu6 and leaky_relu the output, which the next
    layer keeps anyway, tells the derivative; the other activations need the residual.
    """
    act = parse(activation)
    if residual is None or act.code == 0:
        return None, None
    return (None, y) if act.from_output else (residual, None)


def transformed() -> bool:
    """Under torch.func, forward-mode AD or torch.jit.trace, where plain operations must serve."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )
