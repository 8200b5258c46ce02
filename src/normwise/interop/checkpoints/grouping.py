"""From the names of tensors to norms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from normwise.interop.checkpoints.tensors import TensorInfo

__all__ = ["NormPlan", "plans_of"]

ROLES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# A scale and a shift of one vector each look alike in every norm without running statistics; the
# layer's own name has to say which it is. A weight alone is RMS norm only if it says so: PReLU and
# a layer norm without bias have one, too, and language models call RMS norms "layernorm".
KINDS = (
    ("rms_norm", re.compile(r"rms", re.I), False),
    ("layer_norm", re.compile(r"layer_?norm|^ln(_?\w{1,2})?$", re.I), True),
    ("group_norm", re.compile(r"group_?norm|^gn_?\d*$", re.I), True),
    ("instance_norm", re.compile(r"instance_?norm|^in_?norm\d*$", re.I), True),
)
# normwise's domains: further running statistics of a layer, under its scale and shift.
DOMAIN = re.compile(r"(.*)\.domains\.[^.]+")


@dataclass(frozen=True)
class NormPlan:
    """Which tensors make a norm: role to name, and what the file says beside them."""

    name: str
    kind: str
    tensors: Mapping[str, str]
    eps: float | None = None
    momentum: float | None = None


def _kind(prefix: str, roles: Mapping[str, TensorInfo]) -> str | None:
    if "running_mean" in roles and "running_var" in roles:
        return "batch_norm"
    weight, bias = roles.get("weight"), roles.get("bias")
    if weight is None or len(weight.shape) != 1 or "running_mean" in roles:
        return None
    if bias is not None and bias.shape != weight.shape:
        return None
    own = prefix.rpartition(".")[2]
    for kind, pattern, shifts in KINDS:
        if pattern.search(own) and (bias is not None or not shifts):
            return kind
    return None


def plans_of(tensors: Mapping[str, TensorInfo]) -> list[NormPlan]:
    """The norms of a state dict, in its order."""
    layers: dict[str, dict[str, str]] = {}
    for name in tensors:
        prefix, _, role = name.rpartition(".")
        if role in ROLES:
            layers.setdefault(prefix, {})[role] = name
    plans = []
    for prefix, names in layers.items():
        kind = _kind(prefix, {role: tensors[name] for role, name in names.items()})
        if kind is None:
            continue
        if match := DOMAIN.fullmatch(prefix):
            owner = layers.get(match[1], {})
            names = {r: owner[r] for r in ("weight", "bias") if r in owner} | names
        plans.append(NormPlan(prefix, kind, names))
    return plans
