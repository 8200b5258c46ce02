"""The changes of a plan by name, and how they are made to a model: the original, a copy, another
instance of the same class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normwise.graph.modules import ChannelAffine, Tail, activation_module, bordered
from normwise.graph.norms import Norm, replaceable
from normwise.graph.plan import Plan

__all__ = ["Edits", "NormEdit", "apply", "edits_of", "paths_of"]


@dataclass
class NormEdit:
    """What stands in the place of a norm.

    kind: 'identity' (with the norm's activation), 'tail' (that takes a residual too), 'affine', or
    'neutral': the norm stays and is made to change nothing, where only its caller's code could drop
    it.
    """

    path: str
    kind: str
    activation: str | None = None
    channel_dim: int = 1
    weight: Tensor | None = None
    bias: Tensor | None = None
    chain: tuple[str, ...] = ()
    """Modules inside the norm, by their names there, that its own forward called on the result."""
    neutral: dict[str, float] = field(default_factory=dict)
    """full name of a parameter or buffer -> the value that makes the norm change nothing."""


@dataclass
class Edits:
    """All changes by name, in float64."""

    parameters: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    """module -> the bias that it did not have."""
    borders: dict[str, Tensor] = field(default_factory=dict)
    norms: list[NormEdit] = field(default_factory=list)

    def structure(self) -> dict[str, Any]:
        """All that is not numbers, as JSON knows it."""
        return {
            "biases": list(self.biases),
            "borders": {name: list(t.shape) for name, t in self.borders.items()},
            "norms": [
                {
                    "path": e.path,
                    "kind": e.kind,
                    "activation": e.activation,
                    "channel_dim": e.channel_dim,
                    "chain": list(e.chain),
                    "features": None if e.weight is None else e.weight.numel(),
                }
                for e in self.norms
                if e.kind != "neutral"
            ],
            "neutral": sorted(name for e in self.norms for name in e.neutral),
        }


def _norm_edit(norm: Norm, plan: Plan, places: dict[int, str]) -> NormEdit | None:
    fate = plan.fates[norm]
    if fate.action == "left":
        return None
    site = norm.sites[0]
    replaced = site.call is not None and norm.module is not None
    if not replaced or not replaceable(norm):
        values = {"mean": 0.0, "var": 1.0 - site.eps, "weight": 1.0, "bias": 0.0}
        neutral = {}
        for name, number in values.items():
            value = getattr(site, name)
            if value is not None:
                neutral[places[id(value.tensor)]] = number
        return NormEdit(norm.name, "neutral", neutral=neutral)
    with_residual = any(s.residual is not None for s in norm.sites)
    names = {m: name for name, m in norm.module.named_modules()} if norm.module else {}
    chain = tuple(names[m] for m in norm.chain or ())
    if fate.action == "multiply-add":
        a, b = plan.affine[norm]
        return NormEdit(norm.name, "affine", norm.activation, site.channel_dim, a, b, chain)
    kind = "tail" if with_residual else "identity"
    return NormEdit(norm.name, kind, norm.activation, chain=chain)


def edits_of(plan: Plan) -> Edits:
    """The plan's changes, told from the model that it was made on."""
    around = plan.surroundings
    places: dict[int, str] = {}
    for path, module in around.model.named_modules():
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None:
                places.setdefault(id(t), f"{path}.{name}".lstrip("."))
    edits = Edits()
    for t, value in plan.weights.changed.values():
        edits.parameters[places[id(t)]] = value
    for (module, _), value in plan.weights.added.items():
        edits.biases[around.path_of(module)] = value
    for module, value in plan.weights.borders.items():
        edits.borders[around.path_of(module)] = value
    made = (_norm_edit(norm, plan, places) for norm in plan.norms)
    edits.norms = [e for e in made if e is not None]
    return edits


def paths_of(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, name) of every place at which ``module`` is held."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is module
    ]


def _replace(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """``new`` in every place of the module at ``path``; the model, which is new if path is ''."""
    old = model.get_submodule(path)
    new.train(old.training)
    for parent, name in paths_of(model, old):
        parent._modules[name] = new
    return new if path == "" else model


def _in_turn(first: nn.Module, rest: list[nn.Module]) -> nn.Module:
    modules = [*([] if type(first) is nn.Identity else [first]), *rest]
    return first if not rest else modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _like(value: Tensor, like: Tensor) -> Tensor:
    return value.to(device=like.device, dtype=like.dtype, copy=True)


def _named(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def _tensors(norm: nn.Module) -> Iterator[Tensor]:
    for name in ("weight", "bias", "running_mean", "running_var"):
        t = getattr(norm, name, None)
        if isinstance(t, Tensor):
            yield t


@torch.no_grad()
def apply(edits: Edits, model: nn.Module) -> nn.Module:
    """Make the changes to ``model``, each number rounded once to its parameter's dtype."""
    for name, value in edits.parameters.items():
        module, last = _named(model, name)
        t = getattr(module, last)
        # In memory of its own: in place, what another parameter views may not change with it.
        t.data = torch.empty_like(t).copy_(value)
    for path, value in edits.biases.items():
        module = model.get_submodule(path)
        weight = next(module.parameters())
        bias = nn.Parameter(_like(value, weight), weight.requires_grad)
        module.register_parameter("bias", bias)
    for edit in edits.norms:
        for name, number in edit.neutral.items():
            module, last = _named(model, name)
            getattr(module, last).fill_(number)
        if edit.kind == "neutral":
            continue
        if edit.kind == "affine":
            assert edit.weight is not None
            assert edit.bias is not None
            like = next(_tensors(model.get_submodule(edit.path)))
            trained = any(p.requires_grad for p in model.get_submodule(edit.path).parameters())
            new: nn.Module = ChannelAffine(
                _like(edit.weight, like),
                _like(edit.bias, like),
                edit.channel_dim,
                edit.activation,
                trained,
            )
        elif edit.kind == "tail":
            new = Tail(edit.activation)
        else:
            new = activation_module(edit.activation)
        inner = [model.get_submodule(edit.path).get_submodule(name) for name in edit.chain]
        model = _replace(model, edit.path, _in_turn(new, inner))
    for path, value in edits.borders.items():
        conv = model.get_submodule(path)
        border = _like(value, next(conv.parameters()))
        model = _replace(model, path, bordered(conv, border))
    return model
