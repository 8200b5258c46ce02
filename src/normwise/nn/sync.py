"""Synchronised batch norm over torch.distributed, on any device that has a backend for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normwise import functional as F
from normwise.functional.by_moments import merge_over
from normwise.functional.collectives import group_of
from normwise.functional.sync_batch_norm import sync_batch_norm
from normwise.nn.batchnorm import _FusedBatchNorm
from normwise.nn.naming import describe

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_FusedBatchNorm):
    r"""Batch norm over the batch that all ranks of a process group hold together, any rank.

    In training each rank takes the moments (count, mean, m2) of its own batch; they are gathered
    and merged exactly (Chan, Golub & LeVeque 1979, eq. 2.1), so unequal batches, empty ones and
    masks give what one process gives on the concatenated batch: outputs, gradients of the inputs,
    running statistics. Gradients of the parameters are this rank's share; summed over the ranks
    they are the whole (DistributedDataParallel averages them, as always). One gather of 2C + 1
    float64 numbers a rank forward, one sum of 2C backward, asynchronous while the parameters'
    gradients are made. The idea is that of Peng et al. 2018 (MegDet, section 3.2).

    Outside of a process group, in a group of one, and in eval mode it is plain batch norm.
    ``torch.nn.SyncBatchNorm`` refuses CPU tensors, and DistributedDataParallel refuses its
    subclasses on the CPU; this class derives from ``_BatchNorm`` and trains under both.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias, activation,
            channel_dim, nonfinite, normalize_with, update_stats, domains: those of
            :class:`~normwise.nn.BatchNorm`.
        process_group: the group whose batches are one; None for all ranks. Every rank of it calls
            the layer equally often, in training mode.

    Call:
        ``bn(x, residual=None, mask=None, lengths=None)``, as :class:`~normwise.nn.BatchNorm`.

    Raises:
        InputError: a group that this rank is not in.
        CollectiveError: another rank failed, or did not come within the group's timeout; the
            message names the layer.

    The state dict is that of :class:`torch.nn.SyncBatchNorm`. Second derivatives
    (``create_graph=True``) go through the collectives, too; ``torch.func`` does not.
    """

    process_group: Any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        channel_dim: int = 1,
        nonfinite: str = "propagate",
        normalize_with: str | None = None,
        update_stats: bool | None = None,
        domains: Sequence[str] = (),
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias,
            activation=activation, channel_dim=channel_dim, nonfinite=nonfinite,
            normalize_with=normalize_with, update_stats=update_stats, domains=domains,
        )  # fmt: skip
        self.process_group = process_group

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
        **options: Any,
    ) -> Tensor:
        # As torch.nn's: without buffers the batch normalizes in eval too, but each rank alone, as
        # evaluation often runs on one rank.
        group = group_of(self.process_group) if training and self.training else None
        statistics = (running_mean, running_var, weight, bias)
        if group is None:
            return F.batch_norm(input, *statistics, training, momentum, eps, **options)
        return sync_batch_norm(
            input, *statistics, momentum, eps, group=group, who=self._who(), **options
        )

    def _who(self) -> Any:
        return None if torch.compiler.is_compiling() else lambda: describe(self)

    def _merged_over_ranks(self, moments: Tensor) -> Tensor:
        group = group_of(self.process_group) if self.training else None
        return moments if group is None else merge_over(moments, group, self._who())

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        memo[id(self.process_group)] = self.process_group  # a connection is shared, never copied
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """``module`` with every batch norm in it (torch.nn's or ours) replaced by this class.

        As :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`: the children are replaced in
        place, parameters and buffers are shared with the old layers, a layer that occurs twice
        stays one. Ours keep activation, channel_dim and the other options.
        """
        return _converted(module, process_group, cls, {})


_OPTIONS: dict[str, Any] = {"activation": None, "channel_dim": 1, "nonfinite": "propagate"}


def _converted(
    module: nn.Module, group: Any, cls: type[SyncBatchNorm], done: dict[nn.Module, nn.Module]
) -> nn.Module:
    if module in done:
        return done[module]
    result = done[module] = module
    if isinstance(module, _BatchNorm) and not isinstance(module, cls):
        result = done[module] = _of(module, group, cls)
        return result
    for name, child in module._modules.items():  # named_children leaves out what occurs twice
        if child is not None:
            module._modules[name] = _converted(child, group, cls, done)
    return result


def _of(module: _BatchNorm, group: Any, cls: type[SyncBatchNorm]) -> SyncBatchNorm:
    """A synchronised layer that shares the parameters and buffers of ``module``."""
    known: Any = module
    options: Any = {name: getattr(known, name, default) for name, default in _OPTIONS.items()}
    twin = cls(
        known.num_features, known.eps, known.momentum, known.affine, known.track_running_stats,
        group, "meta", bias=known.bias is not None,
        **options,
        normalize_with=getattr(known, "normalize_with", None),
        update_stats=getattr(known, "update_stats", None),
    )  # fmt: skip
    twin._parameters.update(known._parameters)
    for name, value in known._buffers.items():
        twin._buffers[name] = value
    if known._modules.get("domains") is not None:
        twin._modules["domains"] = known._modules["domains"]
    twin.training = known.training
    return twin
