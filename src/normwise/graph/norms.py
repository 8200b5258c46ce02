"""Batch norms in a trace: every call of one, whoever makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn.modules.batchnorm import _BatchNorm

from normwise.graph.record import ModuleCall, Node, Trace, Value
from normwise.nn import FrozenBatchNorm
from normwise.nn.batchnorm import _FusedBatchNorm

__all__ = ["Norm", "Site", "find_norms", "is_norm", "replaceable"]

_KNOWN_FORWARDS = {
    _BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    _FusedBatchNorm.forward,
    FrozenBatchNorm.forward,
}


@dataclass(eq=False)
class Site:
    """One call of a batch norm."""

    node: Node
    x: Value
    mean: Value | None
    var: Value | None
    weight: Value | None
    bias: Value | None
    eps: float
    training: bool
    channel_dim: int = 1
    residual: Value | None = None
    mask: Value | None = None
    activation: str | None = None
    call: ModuleCall | None = None
    """The call of the norm module itself, if a module makes it."""

    @property
    def axis(self) -> int:
        return self.channel_dim % max(len(self.x.shape), 1)

    @property
    def y(self) -> Value:
        return self.node.outputs[0]


@dataclass(eq=False)
class Norm:
    """A batch norm with all its calls; ``module`` None for one that is written as a function."""

    name: str
    module: nn.Module | None
    sites: list[Site] = field(default_factory=list)
    chain: tuple[nn.Module, ...] | None = ()
    """The modules of its own that its forward calls on the result, one after the other (timm's
    ``BatchNormAct2d``: a dropout, an activation); None if its forward does anything else."""

    def tensors(self) -> list[Tensor]:
        """Its parameters and buffers."""
        site = self.sites[0]
        values = (site.mean, site.var, site.weight, site.bias)
        return [v.tensor for v in values if v is not None and v.tensor is not None]

    @property
    def activation(self) -> str | None:
        return self.sites[0].activation

    def affine(self) -> tuple[Tensor, Tensor]:
        """a = gamma / sqrt(var + eps) and b = beta - a * mean, in float64."""
        site = self.sites[0]
        assert site.mean is not None
        assert site.var is not None
        assert site.mean.tensor is not None
        assert site.var.tensor is not None
        mean, var = site.mean.tensor.double().cpu(), site.var.tensor.double().cpu()
        a = (var + site.eps).rsqrt()
        if site.weight is not None and site.weight.tensor is not None:
            a = a * site.weight.tensor.double().cpu()
        b = -a * mean
        if site.bias is not None and site.bias.tensor is not None:
            b = b + site.bias.tensor.double().cpu()
        return a.detach(), b.detach()


_FUNCTIONAL = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum",
               "eps")  # fmt: skip
_NATIVE = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_NORMALIZE = ("input", "running_mean", "running_var", "weight", "bias", "residual", "mask",
              "channel_dim", "eps", "activation")  # fmt: skip
_TRAIN = ("input", "weight", "bias", "residual", "mask", "channel_dim", "eps", "activation")


def _bound(node: Node, names: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def site_of(node: Node) -> Site | None:
    """``node`` as a call of batch norm, or None."""
    name = node.name
    scripted = isinstance(node.func, (OpOverload, OpOverloadPacket))
    if name == "batch_norm" or (name == "native_batch_norm" and not scripted):
        native = node.func is not torch.nn.functional.batch_norm
        a = _bound(
            node,
            _NATIVE if native else _FUNCTIONAL,
            {"weight": None, "bias": None, "training": False, "eps": 1e-5},
        )
    elif name == "normwise::normalize":
        a = {**_bound(node, _NORMALIZE, {}), "training": False}
    elif name == "normwise::train_forward":
        a = {**_bound(node, _TRAIN, {}), "training": True}
        a |= {"running_mean": None, "running_var": None}
    else:
        return None
    activation = a.get("activation")
    return Site(
        node, a["input"], a["running_mean"], a["running_var"], a["weight"], a["bias"],
        float(a["eps"]), bool(a["training"]) or a["running_mean"] is None,
        int(a.get("channel_dim", 1)), a.get("residual"), a.get("mask"),
        None if activation == "none" else activation,
    )  # fmt: skip


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, (_BatchNorm, FrozenBatchNorm))


def _has_known_forward(module: nn.Module) -> bool:
    return type(module).forward in _KNOWN_FORWARDS


def replaceable(norm: Norm) -> bool:
    """Whether another module can stand where the norm stands."""
    return norm.module is not None and norm.chain is not None


def _chain(trace: Trace, norm: Norm) -> tuple[nn.Module, ...] | None:
    """:attr:`Norm.chain` of a norm whose class has a forward of its own."""
    chains = []
    for site in norm.sites:
        call = site.call
        if call is None or call.dynamic or call.inputs != [site.x]:
            return None
        if any(n.inside is call and n is not site.node for n in trace.nodes):
            return None
        value, inner = site.y, []
        for c in trace.calls:
            if c.parent is call:
                if c.inputs != [value] or len(c.outputs) != 1 or value.kept:
                    return None
                value = c.outputs[0]
                inner.append(c.module)
        if call.outputs != [value]:
            return None
        chains.append(tuple(m for m in inner if type(m) is not nn.Identity))
    own = set(norm.module.modules()) if norm.module is not None else set()
    alike = all(chain == chains[0] for chain in chains)
    return chains[0] if alike and own.issuperset(chains[0]) else None


def _of_parameters(value: Value) -> bool:
    """``value`` follows from parameters alone."""
    stack, seen = [value], {value}
    while stack:
        v = stack.pop()
        before = [] if v.maker is None else v.maker.inputs
        if not before and v.origin != "parameter":
            return False
        stack += [w for w in before if w not in seen]
        seen.update(before)
    return True


def find_norms(model: nn.Module, trace: Trace, path_of: Callable[[nn.Module], str]) -> list[Norm]:
    """The batch norms that ran, in the order of their first call."""
    norms: dict[Any, Norm] = {}
    taken: dict[str, int] = {}
    for node in trace.nodes:
        site = site_of(node)
        if site is None or _of_parameters(site.x):
            continue  # weight standardization may be written as a batch norm of the weight
        call = next((c for c in node.inside.chain() if is_norm(c.module)), None)
        site.call = call
        module = None if call is None else call.module
        if module is not None:
            key: Any = module
            name = path_of(module)
        else:
            own = [v.tensor for v in (site.mean, site.var) if v is not None]
            key = tuple(id(t) for t in own) if own and None not in own else node
            path = path_of(node.inside.module)
            name = f"{path}.batch_norm" if path else "batch_norm"
            if key not in norms:
                taken[name] = taken.get(name, 0) + 1
                name += f"#{taken[name]}" if taken[name] > 1 else ""
        norms.setdefault(key, Norm(name, module)).sites.append(site)
    for norm in norms.values():
        if norm.module is not None and not _has_known_forward(norm.module):
            norm.chain = _chain(trace, norm)
    return list(norms.values())
