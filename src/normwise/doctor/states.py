"""The norms of a model or of a checkpoint, as :class:`NormState`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from normwise.doctor.subject import NormState
from normwise.errors import InputError, message
from normwise.nn import FrozenBatchNorm

__all__ = ["of_file", "of_model", "of_state_dict", "tensors_in"]

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
    """The norms of a state dict, also one that is nested under ``'state_dict'`` and the like."""
    from normwise.interop.checkpoints import group_norms
    from normwise.interop.checkpoints.state_dicts import without_prefix

    held = tensors_in(state)
    full = without_prefix(list(held))
    shapes = {short: tuple(held[name].shape) for short, name in full.items()}
    found = group_norms(shapes, lambda short: held[full[short]].detach().cpu())
    return [_of_stored(stored) for stored in found]


def tensors_in(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, or of the one that it wraps, by their names there."""
    from normwise.interop.checkpoints.state_dicts import state_dict_of

    found = state_dict_of(state, Tensor, _refuse) if isinstance(state, dict) else dict(state)
    held = {k: t for k, t in found.items() if isinstance(t, Tensor) and not t.is_meta}
    if not held:
        _refuse(f"a {type(state).__name__} with {len(state)} entries and no tensor")
    return held


def _refuse(got: str) -> NoReturn:
    raise InputError(message("a state dict maps names to tensors", got, "model.state_dict()"))


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
