"""Functional forms, with torch.nn.functional's signatures and keyword-only additions."""

from normwise.functional.batch_norm import batch_moments, batch_norm, batch_norm_update
from normwise.functional.group_norm import group_norm
from normwise.functional.instance_norm import instance_norm
from normwise.functional.row_norms import layer_norm, rms_norm

__all__ = [
    "batch_moments",
    "batch_norm",
    "batch_norm_update",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
]
