"""Lazy batch norms: ``num_features`` from the first input, as in torch.nn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normwise.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"]

# torch.nn's lazy classes bring the uninitialized parameters, ours (the classes they become) bring
# the forward and the options; the mixin sets the options once the lazy buffers are there.
if TYPE_CHECKING:
    _Base = BatchNorm1d
else:
    _Base = object


class _LazyOptions(_Base):
    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        channel_dim: int = 1,
        nonfinite: str = "propagate",
        normalize_with: str | None = None,
        update_stats: bool | None = None,
    ) -> None:
        # The next class is torch.nn's lazy one, which has no num_features.
        lazy: Any = super()
        lazy.__init__(eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._set_options(activation, channel_dim, nonfinite)
        self.normalize_with, self.update_stats = normalize_with, update_stats

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        """``num_features`` is the size of axis ``channel_dim``; torch.nn's looks at axis 1."""
        self._check_input_dim(input)
        lazy: Any = super()
        lazy.initialize_parameters(input.movedim(self.channel_dim, 1))


class LazyBatchNorm1d(_LazyOptions, torch.nn.LazyBatchNorm1d, BatchNorm1d):
    """:class:`BatchNorm1d` whose ``num_features`` comes from the first input; becomes one then."""

    cls_to_become = BatchNorm1d
    _check_input_dim = BatchNorm1d._check_input_dim


class LazyBatchNorm2d(_LazyOptions, torch.nn.LazyBatchNorm2d, BatchNorm2d):
    """:class:`BatchNorm2d` whose ``num_features`` comes from the first input; becomes one then."""

    cls_to_become = BatchNorm2d
    _check_input_dim = BatchNorm2d._check_input_dim


class LazyBatchNorm3d(_LazyOptions, torch.nn.LazyBatchNorm3d, BatchNorm3d):
    """:class:`BatchNorm3d` whose ``num_features`` comes from the first input; becomes one then."""

    cls_to_become = BatchNorm3d
    _check_input_dim = BatchNorm3d._check_input_dim
