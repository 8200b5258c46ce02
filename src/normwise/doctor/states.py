"""The norms of a model or of a checkpoint, as :class:`NormState`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from normwise.doctor.subject import NormState
from normwise.errors import InputError, message
from normwise.nn import FrozenBatchNorm

__all__ = ["of_file", "of_model", "of_state_dict"]

_KINDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((_BatchNorm, FrozenBatchNorm), "batch_norm"),
    ((_InstanceNorm,), "instance_norm"),
    ((nn.LayerNorm,), "layer_norm"),
    ((nn.GroupNorm,), "group_norm"),
    ((nn.RMSNorm,), "rms_norm"),
)


def _kind(module: nn.Module) -> str | None:
    return next((kind for classes, kind in _KINDS if isinstance(module, classes)), None)


def _held(module: nn.Module, name: str) -> Tensor | None:
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.is_meta:
        return None
    return tensor.detach().cpu()


def of_module(name: str, module: nn.Module, kind: str) -> NormState:
    tracked = _held(module, "num_batches_tracked")
    momentum = getattr(module, "momentum", None)
    return NormState(
        name,
        kind,
        _held(module, "weight"),
        _held(module, "bias"),
        _held(module, "running_mean"),
        _held(module, "running_var"),
        None if tracked is None else int(tracked),
        getattr(module, "eps", None),
        momentum,
        cumulative=momentum is None and isinstance(module, (_BatchNorm, _InstanceNorm)),
        module=module,
    )


def of_model(model: nn.Module) -> list[NormState]:
    """Each norm once, under its first name."""
    return [
        of_module(name, module, kind)
        for name, module in model.named_modules()
        if (kind := _kind(module)) is not None
    ]


def of_file(path: str | os.PathLike[str]) -> list[NormState]:
    """The norms of a checkpoint file or folder; no other tensor is read."""
    from normwise.interop.checkpoints import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        return [_of_stored(stored) for stored in checkpoint.norms()]


def of_state_dict(state: Mapping[str, Any]) -> list[NormState]:
    """The norms of a state dict."""
    tensors = {
        key: value.detach().cpu()
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, Tensor) and not value.is_meta
    }
    if not tensors:
        raise InputError(
            message(
                "a state dict maps names to tensors",
                f"a {type(state).__name__} with {len(state)} entries and no tensor",
                "model.state_dict()",
            )
        )
    from normwise.interop.checkpoints import group_norms

    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return [_of_stored(stored) for stored in group_norms(shapes, tensors.__getitem__)]


def _of_stored(stored: Any) -> NormState:
    tracked = stored.num_batches_tracked
    return NormState(
        stored.name,
        stored.kind,
        stored.weight,
        stored.bias,
        stored.running_mean,
        stored.running_var,
        None if tracked is None else int(tracked),
        stored.eps,
        stored.momentum,
    )
