"""Group norm: torch.nn's constructor, attributes and state, our function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise import functional as F
from normwise.nn.fused import CarriesActivation, drop_bias

__all__ = ["GroupNorm"]


class GroupNorm(CarriesActivation, torch.nn.GroupNorm):
    r"""Group norm over ``(N, C, *)``: drop-in for :class:`torch.nn.GroupNorm`.

    :math:`y = (x - \mu_{ng}) / \sqrt{\sigma_{ng}^2 + \epsilon}\,\gamma_c + \beta_c`, with one mean
    and biased variance for each sample and group of ``num_channels / num_groups`` neighbouring
    channels (Wu & He 2018, eq. 1 to 4). The same in training and eval, at any batch size.

    Args:
        num_groups: :math:`G`, a divisor of ``num_channels``: 1 averages over all of a sample,
            ``num_channels`` is instance norm.
        num_channels: :math:`C`, the size of the channel axis.
        eps: added to the variance. Default 1e-5.
        affine: whether there are a ``weight`` (gamma, from 1) and a ``bias`` (beta, from 0), one
            value a channel.
        device, dtype: of the parameters.
        bias: False for a weight without a bias.
        activation: 'relu', 'silu', 'gelu', … (those of :class:`BatchNorm1d`) or None.
        channel_dim: the axis of the channels; -1 for channel-last data. Not 0, the batch's.

    Call:
        ``norm(x, residual=None)``: ``y = activation(norm(x) + residual)``, of one shape.

    The state dict is torch.nn's. Input float64, float32, bfloat16 or float16, also with float32
    parameters; statistics are taken in float64 (float32 on devices without it).

    Example:
        >>> import torch, normwise as nw
        >>> norm = nw.nn.GroupNorm(2, 4, eps=0.0)
        >>> norm(torch.tensor([[1.0, 3.0, 10.0, 30.0]])).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """

    channel_dim: int

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        drop_bias(self, bias)
        self._set_activation(activation)
        self.channel_dim = channel_dim

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(norm(input) + residual)``."""
        return F.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps,
            residual=residual, activation=self.activation, channel_dim=self.channel_dim,
        )  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("channel_dim", 1)
