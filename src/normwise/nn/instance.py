"""Instance norms: torch.nn's constructors, attributes, state and semantics, our function."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normwise import functional as F
from normwise.errors import InputError, message
from normwise.nn.fused import CarriesActivation, drop_bias

__all__ = [
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
]

# Stands before torch.nn's class among the bases, so its super() is that class.
if TYPE_CHECKING:
    from torch.nn.modules.instancenorm import _InstanceNorm as _Base
else:
    _Base = object


class _FusedInstanceNorm(CarriesActivation, _Base):
    """What the instance norm layers share."""

    channel_dim: int

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self._set_options(bias, activation, channel_dim)

    def _set_options(self, bias: bool, activation: str | None, channel_dim: int) -> None:
        drop_bias(self, bias)
        self._set_activation(activation)
        self.channel_dim = channel_dim

    def _check_input_dim(self, input: Tensor) -> None:
        rank: int = self._get_no_batch_dim()  # type: ignore[no-untyped-call] # torch's method is untyped
        if input.dim() not in (rank, rank + 1):
            raise InputError(
                message(
                    f"expected {rank}D or {rank + 1}D input for {type(self).__name__}",
                    f"{input.dim()}D input of shape {tuple(input.shape)}",
                    "normwise.functional.instance_norm, which takes any rank",
                )
            )

    def _batched(self, t: Tensor | None) -> Tensor | None:
        """A single sample as a batch of one."""
        single: int = self._get_no_batch_dim()  # type: ignore[no-untyped-call] # torch's method is untyped
        return t.unsqueeze(0) if t is not None and t.dim() == single else t

    def _check_features(self, input: Tensor, batch: Tensor) -> None:
        axis = self.channel_dim % batch.dim()
        features = batch.shape[axis]
        if features == self.num_features:
            return
        dim = axis - (batch.dim() - input.dim())
        if self.affine:
            raise InputError(
                message(
                    f"expected input's size at dim={dim} to match num_features "
                    f"({self.num_features})",
                    f"{features}",
                    f"num_features={features}, or channel_dim= if the channels lie elsewhere",
                )
            )
        warnings.warn(
            f"input's size at dim={dim} does not match num_features. You can silence this warning "
            "by not passing in num_features, which is not used because affine=False",
            stacklevel=3,
        )

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """``activation(norm(input) + residual)``; ``mask`` is True where an element counts."""
        self._check_input_dim(input)
        batch = self._batched(input)
        assert batch is not None
        self._check_features(input, batch)
        y = F.instance_norm(
            batch,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
            residual=self._batched(residual),
            mask=self._batched(mask),
            activation=self.activation,
            channel_dim=self.channel_dim,
        )
        return y if batch is input else y.squeeze(0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("channel_dim", 1)


_ARGUMENTS = """
    Args:
        num_features: :math:`C`, the size of the channel axis.
        eps: added to the variance, > 0. Default 1e-5.
        momentum: the weight of the new samples in the running statistics; None leaves them, as in
            torch.nn. Default 0.1.
        affine: whether there are a ``weight`` (gamma, from 1) and a ``bias`` (beta, from 0).
            Default False, unlike batch norm's.
        track_running_stats: whether there are running statistics, which normalize in eval mode.
            Default False: each sample normalizes itself in eval too.
        device, dtype: of parameters and buffers.
        bias: False for a weight without a bias.
        activation: 'relu', 'silu', 'gelu', … (those of :class:`BatchNorm1d`) or None.
        channel_dim: the axis of the channels in a batch; -1 for channel-last data. Not 0.

    Call:
        ``norm(x, residual=None, mask=None)``: ``y = activation(norm(x) + residual)``. ``residual``
        has the shape of ``x``; ``mask`` is boolean with size 1 on the channel axis. A single
        sample without the batch axis is taken too.

    The state dict is torch.nn's and loads both ways. Input float64, float32, bfloat16 or float16,
    also with float32 parameters; statistics are taken in float64 (float32 on devices without it).
"""


class InstanceNorm1d(_FusedInstanceNorm, torch.nn.InstanceNorm1d):
    __doc__ = (
        r"""Instance norm over ``(N, C, L)``: drop-in for :class:`torch.nn.InstanceNorm1d`.

    :math:`y = (x - \mu_{nc}) / \sqrt{\sigma_{nc}^2 + \epsilon}\,\gamma_c + \beta_c`, with one mean
    and biased variance for each channel of each sample (Ulyanov et al. 2016).
"""
        + _ARGUMENTS
    )


class InstanceNorm2d(_FusedInstanceNorm, torch.nn.InstanceNorm2d):
    __doc__ = (
        r"""Instance norm over ``(N, C, H, W)``: drop-in for :class:`torch.nn.InstanceNorm2d`.

    :math:`y = (x - \mu_{nc}) / \sqrt{\sigma_{nc}^2 + \epsilon}\,\gamma_c + \beta_c`, with one mean
    and biased variance for each channel of each sample (Ulyanov et al. 2016).
"""
        + _ARGUMENTS
    )


class InstanceNorm3d(_FusedInstanceNorm, torch.nn.InstanceNorm3d):
    __doc__ = (
        r"""Instance norm over ``(N, C, D, H, W)``: drop-in for :class:`torch.nn.InstanceNorm3d`.

    :math:`y = (x - \mu_{nc}) / \sqrt{\sigma_{nc}^2 + \epsilon}\,\gamma_c + \beta_c`, with one mean
    and biased variance for each channel of each sample (Ulyanov et al. 2016).
"""
        + _ARGUMENTS
    )


class _LazyOptions(_FusedInstanceNorm):
    """torch.nn's lazy classes bring the uninitialized parameters, ours forward and options."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        channel_dim: int = 1,
    ) -> None:
        # The next class is torch.nn's lazy one, which has no num_features.
        lazy: Any = super()
        lazy.__init__(eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._set_options(bias, activation, channel_dim)

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        """``num_features`` is the size of axis ``channel_dim`` of a batch; torch.nn's looks at
        axis 1 of a single sample too, which is not its channels."""
        self._check_input_dim(input)
        batch = self._batched(input)
        assert batch is not None
        lazy: Any = super()
        lazy.initialize_parameters(batch.movedim(self.channel_dim, 1))


class LazyInstanceNorm1d(_LazyOptions, torch.nn.LazyInstanceNorm1d, InstanceNorm1d):
    """:class:`InstanceNorm1d` whose ``num_features`` comes from the first input."""

    cls_to_become = InstanceNorm1d
    _check_input_dim = InstanceNorm1d._check_input_dim


class LazyInstanceNorm2d(_LazyOptions, torch.nn.LazyInstanceNorm2d, InstanceNorm2d):
    """:class:`InstanceNorm2d` whose ``num_features`` comes from the first input."""

    cls_to_become = InstanceNorm2d
    _check_input_dim = InstanceNorm2d._check_input_dim


class LazyInstanceNorm3d(_LazyOptions, torch.nn.LazyInstanceNorm3d, InstanceNorm3d):
    """:class:`InstanceNorm3d` whose ``num_features`` comes from the first input."""

    cls_to_become = InstanceNorm3d
    _check_input_dim = InstanceNorm3d._check_input_dim
