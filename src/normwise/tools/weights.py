"""Weights by channel: one way of looking at convolutions, transposed ones and linear layers."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["LAYERS", "blocks", "input_range", "output_range", "over_outputs"]

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip


def blocks(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """A view ``(groups, outputs of a group, inputs of a group, kernel)``."""
    w: Tensor = weight.reshape(*weight.shape[:2], -1).unflatten(0, (groups, -1))
    return w.transpose(1, 2) if transposed else w


def output_range(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """max |w| of each output channel."""
    return blocks(weight, groups, transposed).abs().amax((2, 3)).flatten()


def input_range(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """max |w| of each input channel."""
    return blocks(weight, groups, transposed).abs().amax((1, 3)).flatten()


def over_outputs(
    vector: Tensor, weight: Tensor, groups: int = 1, transposed: bool = False
) -> Tensor:
    """A number for each output channel, shaped to multiply ``weight``."""
    rest = (1,) * (weight.dim() - 2)
    if not transposed:
        return vector.view(-1, 1, *rest)
    inputs = weight.shape[0] // groups
    return vector.view(groups, -1).repeat_interleave(inputs, 0).view(*weight.shape[:2], *rest)
