"""What a norm becomes: one function for each target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normwise import nn as ours
from normwise.tools.convert.specs import OPTIONS, PLAIN, Spec

__all__ = ["OPTIONS_OF", "REASONS", "TARGETS", "Made", "Stay"]

REASONS: dict[str, str] = {
    "already": "it is what it would become",
    "custom-class": "its class is a subclass with a forward of its own",
    "other-kind": "the target is made from batch norms",
    "no-such-option": "the target's class lacks an option that the norm uses",
    "rank-unknown": "torch.nn has one class for each rank, and nothing tells the rank; give "
    "example_inputs",
    "no-statistics": "the target keeps statistics, and the norm has none",
    "no-positions": "instance norm averages over positions, and the norm's input has none",
    "uninitialized": "it is lazy and has not seen an input yet",
}


class Stay(Exception):
    """The norm stays as it is; ``reason`` is a key of :data:`REASONS`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Made:
    """A new norm, and whether it computes in eval what the old one did."""

    def __init__(self, module: nn.Module, preserved: bool = True, note: str | None = None) -> None:
        self.module = module
        self.preserved = preserved
        self.note = note


def _own(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names}


def _give(new: nn.Module, tensors: dict[str, Tensor | None]) -> nn.Module:
    """The old norm's own tensors, not copies: optimizers go on holding those in use."""
    for name, t in tensors.items():
        if name in new._parameters:
            if t is not None and not isinstance(t, nn.Parameter):
                t = nn.Parameter(t, requires_grad=False)
            new._parameters[name] = t
        elif name in new._buffers:
            new._buffers[name] = t.detach() if isinstance(t, nn.Parameter) else t
    return new


def _sized(spec: Spec) -> int:
    return next(t.numel() for t in spec.tensors.values() if t is not None and t.dim() == 1)


def _batch(cls: type[nn.Module], old: Any, spec: Spec, **options: Any) -> nn.Module:
    """A batch norm of class ``cls`` (torch.nn's or ours) with the numbers of another one."""
    frozen = spec.kind == "frozen"
    new = cls(
        old.num_features, old.eps, 0.1 if frozen else old.momentum,
        frozen or old.affine, frozen or old.track_running_stats, device="meta", **options,
    )  # fmt: skip
    tensors = dict(spec.tensors)
    mean = tensors.get("running_mean")
    if mean is not None and tensors.get("num_batches_tracked") is None:
        tensors["num_batches_tracked"] = torch.zeros((), dtype=torch.int64, device=mean.device)
    for name in ("weight", "bias"):
        tensors.setdefault(name, None)
    new = _give(new, tensors)
    domains = getattr(old, "domains", None)
    if domains is not None and cls.__module__.startswith("normwise"):
        new._modules["domains"] = domains
    return new


def _lacking(spec: Spec, *names: str) -> None:
    """torch.nn's classes have none of our options."""
    used = [n for n in names if spec.options[n] != OPTIONS[n]]
    if used:
        raise Stay("no-such-option", ", ".join(f"{n}={spec.options[n]!r}" for n in used))


def _class_of_rank(space: Any, name: str, spec: Spec) -> Any:
    if not spec.rank:
        raise Stay("rank-unknown")
    return getattr(space, f"{name}{spec.rank}d")


def to_normwise(old: Any, spec: Spec, options: dict[str, Any]) -> Made:
    """The plain layer of normwise of the same kind."""
    own = spec.options
    if spec.kind in ("batch", "frozen"):
        cls: Any = ours.BatchNorm
        if spec.plain is not None:
            cls = getattr(ours, spec.plain)
        if type(old) is cls:
            raise Stay("already")
        return Made(_batch(cls, old, spec, **own))
    if type(old).__module__.startswith("normwise"):
        raise Stay("already")
    cls = getattr(ours, type(old).__name__)
    return Made(_like(cls, old, spec))


def to_torch(old: Any, spec: Spec, options: dict[str, Any]) -> Made:
    """torch.nn's layer of the same kind."""
    if type(old).__module__.startswith("torch") and type(old) is not nn.SyncBatchNorm:
        raise Stay("already")
    _lacking(spec, "activation", "channel_dim", "normalize_with", "update_stats")
    note = None
    if spec.options["nonfinite"] != OPTIONS["nonfinite"]:
        note = f"torch.nn has no nonfinite={spec.options['nonfinite']!r}"
    if getattr(old, "domains", None) is not None:
        raise Stay("no-such-option", "domains")
    if spec.kind in ("batch", "frozen"):
        return Made(_batch(_class_of_rank(nn, "BatchNorm", spec), old, spec), note=note)
    return Made(_like(getattr(nn, type(old).__name__), old, spec), note=note)


def _like(cls: Any, old: Any, spec: Spec) -> nn.Module:
    """The same kind of norm in the other library."""
    ours_too = cls.__module__.startswith("normwise")
    own = _own(spec.options, "activation") if ours_too else {}
    if spec.kind == "group":
        if ours_too:
            own |= _own(spec.options, "channel_dim")
        new = cls(old.num_groups, old.num_channels, old.eps, old.affine, device="meta", **own)
    elif spec.kind == "instance":
        if ours_too:
            own |= _own(spec.options, "channel_dim")
        new = cls(
            old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats,
            device="meta", **own,
        )  # fmt: skip
    else:
        new = cls(old.normalized_shape, old.eps, old.elementwise_affine, device="meta", **own)
    return _give(new, {**dict.fromkeys(new._parameters), **spec.tensors})


def _variant(name: str) -> Callable[[Any, Spec, dict[str, Any]], Made]:
    def make(old: Any, spec: Spec, options: dict[str, Any]) -> Made:
        cls: Any = getattr(ours, name)
        if spec.kind not in ("batch", "frozen"):
            raise Stay("other-kind")
        if type(old) is cls and not options:
            raise Stay("already")
        if cls is ours.BatchRenorm and spec.tensors.get("running_mean") is None:
            raise Stay("no-statistics")
        new = _batch(cls, old, spec, **spec.options, **options)
        if spec.plain is not None:
            setattr(new, PLAIN, spec.plain)
        # Without running statistics the batch normalizes in eval too, and ghosts are other batches.
        other = cls is ours.GhostBatchNorm and spec.tensors.get("running_mean") is None
        return Made(new, preserved=not other)

    make.__doc__ = f"``normwise.nn.{name}``, over the same parameters and statistics."
    return make


def to_frozen(old: Any, spec: Spec, options: dict[str, Any]) -> Made:
    """Buffers only; what eval computes, in training too."""
    if spec.kind == "frozen":
        raise Stay("already")
    if spec.kind != "batch":
        raise Stay("other-kind")
    if spec.tensors.get("running_mean") is None:
        raise Stay("no-statistics")
    if getattr(old, "domains", None) is not None:
        raise Stay("no-such-option", "domains")
    new = ours.FrozenBatchNorm(
        old.num_features, old.eps, **_own(spec.options, "activation", "channel_dim"), **options
    )
    with torch.no_grad():
        for name, t in spec.tensors.items():
            if t is not None and name in new._buffers:
                new._buffers[name] = t.detach()
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        if spec.tensors.get(name) is None:
            mean = new._buffers["running_mean"]
            assert mean is not None
            new._buffers[name] = torch.full_like(mean, value)
    if spec.plain is not None:
        setattr(new, PLAIN, spec.plain)
    return Made(new)


def to_group(old: Any, spec: Spec, options: dict[str, Any]) -> Made:
    """Group norm with the same scale and shift: another function, to be trained further."""
    if spec.kind == "group":
        raise Stay("already")
    if spec.kind not in ("batch", "frozen", "instance"):
        raise Stay("other-kind")
    channels = _channels(old)
    groups = options.get("num_groups") or math.gcd(32, channels)
    if channels % groups:
        groups = math.gcd(groups, channels)
    affine = spec.tensors.get("weight") is not None or spec.tensors.get("bias") is not None
    new = ours.GroupNorm(
        groups, channels, old.eps, affine, device="meta",
        **_own(spec.options, "activation", "channel_dim"),
    )  # fmt: skip
    module = _give(new, {n: spec.tensors.get(n) for n in ("weight", "bias")})
    return Made(module, preserved=False, note="averages over channels of one sample: train further")


def _channels(old: Any) -> int:
    return int(old.num_features)


def to_instance(old: Any, spec: Spec, options: dict[str, Any]) -> Made:
    """Instance norm; with running statistics, its eval is batch norm's eval."""
    if spec.kind == "instance":
        raise Stay("already")
    if spec.kind not in ("batch", "frozen"):
        raise Stay("other-kind")
    if spec.axes == 0:
        raise Stay("no-positions")
    cls = _class_of_rank(ours, "InstanceNorm", spec)
    affine = spec.tensors.get("weight") is not None or spec.tensors.get("bias") is not None
    tracks = spec.tensors.get("running_mean") is not None
    momentum = getattr(old, "momentum", 0.1)
    new = cls(
        old.num_features, old.eps, 0.1 if momentum is None else momentum, affine, tracks,
        device="meta", **_own(spec.options, "activation", "channel_dim"),
    )  # fmt: skip
    tensors = {name: spec.tensors.get(name) for name in (*new._parameters, *new._buffers)}
    if tracks and tensors.get("num_batches_tracked") is None:
        tensors["num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return Made(_give(new, tensors), preserved=tracks)


TARGETS: dict[str, Callable[[Any, Spec, dict[str, Any]], Made]] = {
    "normwise": to_normwise,
    "torch": to_torch,
    "sync": _variant("SyncBatchNorm"),
    "frozen": to_frozen,
    "ghost": _variant("GhostBatchNorm"),
    "renorm": _variant("BatchRenorm"),
    "group": to_group,
    "instance": to_instance,
}

# Of the targets that do not hand their options on to a class, which refuses what it does not know.
OPTIONS_OF: dict[str, frozenset[str]] = {
    "normwise": frozenset(),
    "torch": frozenset(),
    "group": frozenset({"num_groups"}),
    "instance": frozenset(),
}
