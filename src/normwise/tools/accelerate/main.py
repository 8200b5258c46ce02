"""A whole model: norms swapped, then each module's own forward fused where it can be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normwise.graph.run import Call, copy_of, on_examples, same_random_numbers, tensors_in
from normwise.graph.verify import distance
from normwise.results import Entry, Result
from normwise.tools.accelerate.audit import Untraceable
from normwise.tools.accelerate.classes import PLANS, base_of, install
from normwise.tools.accelerate.inputs import Inputs, UnknownInput
from normwise.tools.accelerate.plans import Plan, Plans
from normwise.tools.accelerate.regions import Region, Search, has_own_code, region_of
from normwise.tools.accelerate.report import AccelerateReport, why_alone
from normwise.tools.convert.main import convert_all

__all__ = ["accelerate"]

M = TypeVar("M", bound=nn.Module)


def _stays(module: nn.Module) -> str | None:
    """Why a norm is not swapped; None where it is."""
    if isinstance(module, nn.SyncBatchNorm):
        return "synchronised"
    if type(module).__module__.startswith("normwise."):
        return "already"
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    away = any(t.device.type not in ("cpu", "meta") for t in tensors)
    return "device" if away else None


class _Fusing:
    """The fusions of one model: looked for, installed, told of."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        # (module, what it is called with, mode) -> its region, or why there is none
        self.regions: dict[nn.Module, list[tuple[Inputs, bool, Region]]] = {}
        self.refused: dict[nn.Module, Untraceable] = {}

    def look(self) -> None:
        searches = {training: Search(training) for training in (True, False)}
        for module in self.paths:
            if not has_own_code(module):
                continue
            forward = base_of(module).forward
            if "forward" in vars(module):
                self.refused[module] = Untraceable("state", "it has a forward of its own")
                continue
            try:
                inputs = Inputs.of_signature(forward)
                for training in (not module.training, module.training):
                    region = region_of(module, forward, inputs, training, searches[training])
                    self.regions.setdefault(module, []).append((inputs, training, region))
            except Untraceable as error:
                self.refused[module] = error
            except UnknownInput as error:
                self.refused[module] = Untraceable("control-flow", str(error))

    def install(self) -> None:
        """Classes first: what a plan relies on includes those of the modules inside it."""
        fusing = [m for m, found in self.regions.items() if any(r.fusions for *_, r in found)]
        for module in fusing:
            install(module, Plans())
        for module in fusing:
            plans = module.__dict__[PLANS]
            for inputs, training, region in self.regions[module]:
                plans.add(Plan(module, base_of(module), inputs, region, training))

    def fused(self) -> dict[nn.Module, str]:
        """Norm -> what it is fused with; for norms written as functions, the module around them."""
        found: dict[nn.Module, str] = {}
        for module, regions in self.regions.items():
            for *_, region in regions:
                for fusion in region.fusions:
                    norm = fusion.norm
                    called = norm.op == "call_module"
                    key = region.modules[str(norm.target)] if called else module
                    found[key] = fusion.text()
        return found

    def why(self, norm: nn.Module) -> tuple[str, str]:
        """(reason, detail) for a norm that is not fused: by the largest part that calls it."""
        found = None
        for regions in self.regions.values():
            reason = why_alone(regions[-1][2], norm)
            if reason is not None:
                found = reason
        if found is not None:
            return found
        for module, error in self.refused.items():
            if any(child is norm for child in module.children()):
                where = self.paths[module] or "the model"
                return error.reason, f"{where}: {error.detail}"
        for module, error in self.refused.items():
            if any(inner is norm for inner in module.modules()):
                where = self.paths[module] or "the model"
                return error.reason, f"{where}: {error.detail}"
        return "not-called", ""


def _entries(fusing: _Fusing, converted: Iterable[Entry]) -> list[Entry]:
    entries = []
    fused = fusing.fused()
    modules = dict(fusing.model.named_modules())
    for entry in converted:
        module = modules[entry.name]
        facts = {"from": entry.facts["from"]}
        if module in fused:
            entries.append(Entry(entry.name, "fused", fused.pop(module), None, facts))
        elif entry.action == "left" and entry.reason != "already":
            entries.append(Entry(entry.name, "left", None, entry.reason, facts))
        else:
            reason, detail = fusing.why(module)
            action = "swapped" if entry.action == "converted" else "left"
            into = entry.into if action == "swapped" else None
            facts = {**facts, "detail": detail or None}
            entries.append(Entry(entry.name, action, into, reason, facts))
    for module, text in fused.items():
        if fusing.paths[module] not in {e.name for e in entries}:
            facts = {"from": "a function"}
            entries.append(Entry(fusing.paths[module], "fused", text, None, facts))
    return entries


def _outputs(model: nn.Module, call: Call) -> list[Tensor]:
    with torch.no_grad(), same_random_numbers():
        return tensors_in(call.copy().run(model.eval()))


def accelerate(
    model: M, example_inputs: Any = None, *, inplace: bool = False
) -> Result[M, AccelerateReport]:
    """The same model, faster: norms by our kernels, in one call with the activation that follows.

    Every norm of torch.nn becomes normwise's, over the same parameters and buffers. Where a
    forward hands a batch norm's result to an activation (relu, relu6, leaky_relu, hardswish, silu,
    gelu, sigmoid, tanh; a module, a function, a method, in place or not), or adds something to it,
    or both, the row becomes one call, ``activation(bn(x) + residual)``, in training and in eval:
    one pass over memory instead of two or three, and autograd keeps less.

    How: each module's own forward is traced with its children as calls, and a row that reaches
    into a child takes that child's forward in. What a trace cannot tell (control flow that looks
    at tensors, side effects, random numbers, contexts) is refused, for that module alone. The
    fused forward runs while all that the trace relied on is as it was: mode, attributes, children,
    hooks. Once something differs it is traced anew, or the forward runs as it was written.

    Args:
        model: any module; left as it was unless ``inplace``.
        example_inputs: what the model is called with (a tensor, a tuple, a dict of keyword
            arguments). With them the outputs before and after are compared in eval.
        inplace: change ``model`` itself. Parameters and buffers are shared with the old norms, so
            an optimizer goes on training those in use.

    Kept: state dict keys, hooks, modes, frozen parts, modules in several places, ``isinstance``,
    class names, copies and pickles. A fused call makes no result between norm and activation, so
    hooks that are put there later see it computed as it was written again.

    Returns:
        Result: ``model`` and ``report``, an :class:`AccelerateReport`; unpacks as ``model,
        report``.

    Raises:
        InputError: a model that cannot be copied, or does not run on the example inputs.

    Example:
        >>> import torch, normwise as nw
        >>> from normwise import accelerate
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        ... )
        >>> fast, report = accelerate(net)
        >>> report["1"].action, report["1"].into
        ('fused', 'relu')
    """
    call = None if example_inputs is None else Call.of(example_inputs)
    before: list[Tensor] = []
    if call is not None:
        twin = copy_of(model)
        with on_examples():
            before = _outputs(twin, call)
    target = model if inplace else copy_of(model)
    converted, new = convert_all(target, "normwise", {}, {}, _stays)
    fusing = _Fusing(new)
    fusing.look()
    entries = _entries(fusing, converted)
    fusing.install()
    facts: dict[str, Any] = {}
    if call is not None:
        facts["difference"] = distance(_outputs(copy_of(new), call), before)
    result: Result[Any, AccelerateReport] = Result(new, AccelerateReport(entries, facts))
    return result
