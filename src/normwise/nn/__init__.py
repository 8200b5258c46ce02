"""Layers that drop in for torch.nn's."""

from normwise.nn.batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from normwise.nn.frozen import FrozenBatchNorm
from normwise.nn.ghost import GhostBatchNorm
from normwise.nn.group import GroupNorm
from normwise.nn.instance import (
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)
from normwise.nn.layer import LayerNorm, RMSNorm
from normwise.nn.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from normwise.nn.renorm import BatchRenorm
from normwise.nn.switches import add_domains
from normwise.nn.sync import SyncBatchNorm

__all__ = [
    "add_domains",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "RMSNorm",
    "SyncBatchNorm",
]
