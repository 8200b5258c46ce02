"""What a norm is, whichever class it has: its kind, its numbers and its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normwise import nn as ours

__all__ = ["PLAIN", "Spec", "spec_of"]

# Class -> (kind, rank). The classes of one kind keep the same parameters and buffers. rank 0 is
# any. A class that is not here has a forward of its own, of which nothing is known.
_KINDS: dict[type[nn.Module], tuple[str, int]] = {
    nn.BatchNorm1d: ("batch", 1),
    nn.BatchNorm2d: ("batch", 2),
    nn.BatchNorm3d: ("batch", 3),
    nn.SyncBatchNorm: ("batch", 0),
    ours.BatchNorm1d: ("batch", 1),
    ours.BatchNorm2d: ("batch", 2),
    ours.BatchNorm3d: ("batch", 3),
    ours.BatchNorm: ("batch", 0),
    ours.SyncBatchNorm: ("batch", 0),
    ours.GhostBatchNorm: ("batch", 0),
    ours.BatchRenorm: ("batch", 0),
    ours.FrozenBatchNorm: ("frozen", 0),
    nn.InstanceNorm1d: ("instance", 1),
    nn.InstanceNorm2d: ("instance", 2),
    nn.InstanceNorm3d: ("instance", 3),
    ours.InstanceNorm1d: ("instance", 1),
    ours.InstanceNorm2d: ("instance", 2),
    ours.InstanceNorm3d: ("instance", 3),
    nn.GroupNorm: ("group", 0),
    ours.GroupNorm: ("group", 0),
    nn.LayerNorm: ("layer", 0),
    ours.LayerNorm: ("layer", 0),
    nn.RMSNorm: ("rms", 0),
    ours.RMSNorm: ("rms", 0),
}

_FAMILIES = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

PLAIN = "plain_class"
"""The attribute in which a norm that takes any rank remembers the class that it was made from."""

# Options that only normwise's classes have, and what torch.nn's are.
OPTIONS: dict[str, Any] = {
    "activation": None,
    "channel_dim": 1,
    "nonfinite": "propagate",
    "normalize_with": None,
    "update_stats": None,
}


@dataclass
class Spec:
    """A norm apart from its class."""

    kind: str
    rank: int
    options: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    axes: int | None = None
    """How many axes its input was seen to have beside batch and channels."""
    plain: str | None = None
    """The name of the class of fixed rank that it is or was."""


def spec_of(module: nn.Module) -> Spec | None:
    """What ``module`` is; None for a class that is not known, or that is not ready yet."""
    if type(module) not in _KINDS:
        return None
    kind, rank = _KINDS[type(module)]
    tensors = {**module._parameters, **module._buffers}
    options = {name: getattr(module, name, default) for name, default in OPTIONS.items()}
    plain = type(module).__name__ if rank else getattr(module, PLAIN, None)
    if not rank and isinstance(plain, str) and plain[-2:-1].isdigit():
        rank = int(plain[-2])
    return Spec(kind, rank, options, tensors, plain=plain)


def is_norm(module: nn.Module) -> bool:
    """Whether a report has a line for ``module``: a norm of a known class or of a subclass."""
    return type(module) in _KINDS or isinstance(
        module,
        (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm),
    )
