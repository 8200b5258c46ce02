"""Torch's own kernels of layer and group norm, where the statistics they return vouch for them.

On CPU they read a row once and know no Python: on float32 tensors of 0.8 to 12 million values 1.3
to 6 times the speed of our operators, which take two passes and more (two threads). What they get
wrong shows in the mean and 1 / std that they return, in float32:

- a mean far from 0 in units of std, which float32 rounds to 2^-24 of itself: mean 1e6 and std 1
  come out off by up to 0.09 on 64 rows of 768;
- constant rows, which come out at a rounding of the mean times 1 / sqrt(eps) instead of at beta;
- values around 1e18 and beyond, whose squares overflow, and rows with inf or NaN.

Then the operators serve the call instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["backward", "forward"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# |mean| / std up to which float32's own rounding of the mean costs no more than two roundings of
# the output, and 1 / std from which on squares of float32 stay far from its limit.
_MEAN = 2.0
_RSTD = 1e-12


def _vouched(mean: Tensor, rstd: Tensor, eps: float) -> bool:
    """Whether every row is one that torch's kernels get right (NaN is not)."""
    if mean.dtype != torch.float32:
        return False
    low, high = torch.aminmax(rstd)
    # A variance under 0.02 eps may be that of a constant row.
    return (
        float(low) > _RSTD
        and float(high) * (1.02 * eps) ** 0.5 < 1.0
        and float((mean * rstd).abs_().max()) <= _MEAN
    )


def _float32(v: Tensor | None, size: int, fill: float) -> Tensor:
    """Parameters in float32: with those of a half type torch keeps statistics in that type."""
    return torch.full((size,), fill) if v is None else v.float()


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(y, mean, rstd) of ``x`` (N, G, P, L) contiguous with weights, or None: not for these."""
    if x.dtype not in _DTYPES or type(x) is not Tensor or not x.is_cpu or eps <= 0:
        return None
    n, g, p, length = x.shape
    if not x.numel():
        return None
    weight, bias = _float32(weight, g * p, 1.0), _float32(bias, g * p, 0.0)
    result: tuple[Tensor, Tensor, Tensor]
    if g == length == 1:
        result = torch.native_layer_norm(x.view(n, p), [p], weight, bias, eps)
    else:
        result = torch.native_group_norm(
            x.view(n, g * p, length), weight, bias, n, g * p, length, g, eps
        )
    return result if _vouched(result[1], result[2], eps) else None


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) by the statistics of `forward`."""
    n, g, p, length = x.shape
    own = _float32(weight, g * p, 1.0)  # group norm's fails for a bias without a weight
    dy = dy.contiguous()
    gradients: Any
    if g == length == 1:
        rows, drows = x.view(n, p), dy.view(n, p)
        # Torch adds up the gradients of a half type's parameters in the half type: on 12 rows of
        # bfloat16 they are off by up to 2 %.
        half = x.dtype != torch.float32 and (wanted[1] or wanted[2])
        gradients = torch.ops.aten.native_layer_norm_backward(
            drows, rows, [p], mean, rstd, own, None if bias is None else bias.float(),
            (wanted[0], wanted[1] and not half, wanted[2] and not half),
        )  # fmt: skip
        if half:
            hat = (rows - mean.view(n, 1)).mul_(rstd.view(n, 1))  # float32, as mean is
            gradients = (gradients[0], hat.mul_(drows).sum(0), drows.sum(0, dtype=torch.float32))
    else:
        gradients = torch.ops.aten.native_group_norm_backward(
            dy.view(n, g * p, length), x.view(n, g * p, length), mean, rstd, own, n, g * p, length,
            g, [wanted[0], True, True],
        )  # fmt: skip
    dx, dweight, dbias = gradients
    return (
        dx,
        dweight.to(weight.dtype) if wanted[1] and weight is not None else None,
        dbias.to(bias.dtype) if wanted[2] and bias is not None else None,
    )
