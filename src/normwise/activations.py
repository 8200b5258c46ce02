"""The activations that a norm can carry: their names, their values, their derivatives.

One table, used by the argument checks, by the reference backend and, through ``code``, by the
kernels. ``'leaky_relu'`` takes a slope in parentheses: ``'leaky_relu(0.2)'``; the plain name means
torch.nn's default of 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normwise.errors import InputError, message

__all__ = ["ACTIVATIONS", "Activation", "parse"]


class Activation(NamedTuple):
    """``y = value(z)`` and ``dy/dz = derivative(z)``; ``code`` is its number in csrc/kernels.h."""

    name: str
    code: int
    slope: float
    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    # For relu and leaky_relu with a positive slope the sign of the output is the sign of z, so
    # the backward of a fused residual needs only the output that the next layer keeps anyway.
    from_output: bool


def _between(z: Tensor, low: float, high: float) -> Tensor:
    return ((z > low) & (z < high)).to(z.dtype)


def _hardswish_derivative(z: Tensor) -> Tensor:
    inner = torch.where(z <= 3, z / 3 + 0.5, torch.ones_like(z))
    return torch.where(z < -3, torch.zeros_like(z), inner)


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _gelu_derivative(z: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    return cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _sigmoid_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


def _leaky(slope: float) -> Activation:
    return Activation(
        "leaky_relu",
        3,
        slope,
        lambda z: F.leaky_relu(z, slope),
        lambda z: torch.where(z > 0, torch.ones_like(z), torch.full_like(z, slope)),
        slope > 0,
    )


# fmt: off
ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("none", 0, 0.0, lambda z: z, torch.ones_like, True),
        Activation("relu", 1, 0.0, torch.relu, lambda z: (z > 0).to(z.dtype), True),
        Activation("relu6", 2, 0.0, F.relu6, lambda z: _between(z, 0, 6), True),
        _leaky(0.01),
        Activation("hardswish", 4, 0.0, F.hardswish, _hardswish_derivative, False),
        Activation("silu", 5, 0.0, F.silu, _silu_derivative, False),
        Activation("gelu", 6, 0.0, F.gelu, _gelu_derivative, False),
        Activation("sigmoid", 7, 0.0, torch.sigmoid, _sigmoid_derivative, False),
        Activation("tanh", 8, 0.0, torch.tanh, lambda z: 1 - torch.tanh(z) ** 2, False),
    )
}
# fmt: on


def parse(text: str) -> Activation:
    """The activation that ``text`` names.

    Raises:
        InputError: for an unknown name, or a slope that is no finite number.
    """
    found = ACTIVATIONS.get(text)
    if found is not None:
        return found
    if text.startswith("leaky_relu(") and text.endswith(")"):
        try:
            slope = float(text[len("leaky_relu(") : -1])
        except ValueError:
            slope = math.nan
        if math.isfinite(slope):
            return _leaky(slope)
    raise InputError(
        message(
            "activation names a function that the norm can carry",
            repr(text),
            "one of None, "
            + ", ".join(repr(n) for n in ACTIVATIONS if n != "none")
            + " or 'leaky_relu(0.2)' with a slope; apply any other after the norm",
        )
    )
