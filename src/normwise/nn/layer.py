"""Layer norm and RMS norm: torch.nn's constructors, attributes and state, our functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normwise import functional as F
from normwise.nn.fused import CarriesActivation

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(CarriesActivation, torch.nn.LayerNorm):
    r"""Layer norm over the last axes: drop-in for :class:`torch.nn.LayerNorm`.

    :math:`y = (x - \mu_i) / \sqrt{\sigma_i^2 + \epsilon} \odot \gamma + \beta`, with one mean and
    biased variance a row, over the axes of ``normalized_shape`` (Ba, Kiros & Hinton 2016, eq. 3
    and 4). The same in training and eval.

    Args:
        normalized_shape: the sizes of the last axes, an int for one.
        eps: added to the variance. Default 1e-5.
        elementwise_affine: whether there are a ``weight`` (gamma, from 1) and a ``bias`` (beta,
            from 0), both of ``normalized_shape``.
        bias: False for a weight without a bias.
        device, dtype: of the parameters.
        activation: 'relu', 'silu', 'gelu', … (those of :class:`BatchNorm1d`) or None.

    Call:
        ``norm(x, residual=None)``: ``y = activation(norm(x) + residual)``, both of shape
        ``(*, *normalized_shape)``.

    The state dict is torch.nn's. Input float64, float32, bfloat16 or float16, also with float32
    parameters; statistics are taken in float64 (float32 on devices without it).

    Example:
        >>> import torch, normwise as nw
        >>> norm = nw.nn.LayerNorm(3, activation="relu")
        >>> norm(torch.tensor([[1e6, 1e6 + 1, 1e6 + 2]])).round(decimals=3)
        tensor([[0.0000, 0.0000, 1.2250]], grad_fn=<RoundBackward1>)
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype
        )
        self._set_activation(activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(norm(input) + residual)``."""
        return F.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps,
            residual=residual, activation=self.activation,
        )  # fmt: skip


class RMSNorm(CarriesActivation, torch.nn.RMSNorm):
    r"""Root mean square norm over the last axes: drop-in for :class:`torch.nn.RMSNorm`.

    :math:`y = x / \sqrt{\frac1D \sum_j x_j^2 + \epsilon} \odot \gamma` for each row (Zhang &
    Sennrich 2019, eq. 4): layer norm that takes the mean for 0 and has no bias.

    Args:
        normalized_shape: the sizes of the last axes, an int for one.
        eps: added to the mean square; None is the machine epsilon of what is computed with
            (float64's for float64, float32's for all others).
        elementwise_affine: whether there is a ``weight`` (gamma, from 1) of ``normalized_shape``.
        device, dtype: of the parameter.
        activation: 'relu', 'silu', 'gelu', … (those of :class:`BatchNorm1d`) or None.

    Call:
        ``norm(x, residual=None)``: ``y = activation(norm(x) + residual)``, both of shape
        ``(*, *normalized_shape)``.

    State dict and dtypes as for :class:`LayerNorm`.

    Example:
        >>> import torch, normwise as nw
        >>> norm = nw.nn.RMSNorm(2, elementwise_affine=False)
        >>> norm(torch.tensor([[3e18, 4e18]]))  # squares beyond float32
        tensor([[0.8485, 1.1314]])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)
        self._set_activation(activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(norm(x) + residual)``."""
        return F.rms_norm(
            x, self.normalized_shape, self.weight, self.eps,
            residual=residual, activation=self.activation,
        )  # fmt: skip
