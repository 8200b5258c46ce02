"""Layers that drop in for torch.nn's."""

from normwise.nn.batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from normwise.nn.frozen import FrozenBatchNorm
from normwise.nn.ghost import GhostBatchNorm
from normwise.nn.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from normwise.nn.renorm import BatchRenorm
from normwise.nn.switches import add_domains
from normwise.nn.sync import SyncBatchNorm

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
    "add_domains",
]
