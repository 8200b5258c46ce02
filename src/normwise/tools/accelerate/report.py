"""What became of each norm, and why one was not fused."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import fx, nn

from normwise.results import Report
from normwise.tools.accelerate import patterns
from normwise.tools.accelerate.regions import Region
from normwise.tools.convert import REASONS as CONVERT_REASONS

__all__ = ["REASONS", "AccelerateReport", "why_alone"]

REASONS: dict[str, str] = {
    "no-activation": "what reads the norm is neither an activation that it can carry nor an "
    "addition",
    "read-twice": "more than one call reads what the norm makes",
    "is-output": "what the norm makes leaves the part of the model that could be traced",
    "is-residual": "it is added to another norm, which takes the addition",
    "order": "what stands between the norm and the addition may write to its input or move its "
    "statistics",
    "hook": "a hook looks at the norm's call",
    "options": "it has an activation already, or its call has options of its own",
    "kind": "only batch norms are fused",
    "control-flow": "the forward that calls it decides by its tensors, or cannot be traced",
    "state": "the forward that calls it reads or keeps something besides tensors, parameters and "
    "plain attributes",
    "not-called": "no forward that could be traced calls it",
    "device": "its tensors are not on the CPU, and our kernels are",
    "custom-class": "its class is a subclass with a forward of its own",
    "synchronised": "torch.nn's SyncBatchNorm has no counterpart on its devices yet",
    "uninitialized": CONVERT_REASONS["uninitialized"],
}


class AccelerateReport(Report):
    """Each norm: ``action`` is one of

    - ``'fused'``: one call with what follows it, ``into`` 'relu', 'add + relu', 'add', …;
    - ``'swapped'``: a layer of normwise, ``into`` its class; ``reason`` says why it is not fused;
    - ``'left'``: as it was; ``reason`` says why.

    ``facts`` of an entry: ``from``, the class that it had; ``detail``. Of the whole, with example
    inputs: ``difference``, the largest difference of the model's outputs in eval, relative to the
    largest value.
    """

    title: ClassVar[str] = "accelerate"
    columns: ClassVar[tuple[str, ...]] = ("detail",)

    def summary(self) -> list[str]:
        lines = [f"{len(self)} norms: {super().summary()[0]}"]
        if self.facts.get("difference") is not None:
            lines.append(f"outputs in eval differ by {self.facts['difference']:.1e} of the largest")
        used = sorted({e.reason for e in self.entries if e.reason is not None})
        return lines + [f"{reason}: {REASONS[reason]}" for reason in used]


def why_alone(region: Region, module: nn.Module) -> tuple[str, str] | None:
    """(reason, detail) for a norm that the region calls and does not fuse; None if not called."""
    taken = {part for fusion in region.fusions for part in fusion.parts}
    for node in region.traced.graph.nodes:
        if node.op == "call_module" and region.modules[str(node.target)] is module:
            return _why(node, region, taken)
    return None


def _why(node: fx.Node, region: Region, taken: set[fx.Node]) -> tuple[str, str]:
    module: Any = region.modules[str(node.target)]
    if not isinstance(module, patterns.NORMS):
        return "kind", ""
    if not patterns.unhooked(module):
        return "hook", ""
    if not patterns.is_norm(node, region.modules):
        return "options", ""
    reader = patterns.reader_of(node)
    if reader is None:
        return "read-twice", f"{len(node.users)} readers" if node.users else "nobody reads it"
    if reader in taken:
        return "is-residual", ""
    if reader.op == "output":
        return "is-output", ""
    name = str(getattr(reader.target, "__name__", reader.target))
    if patterns.addition_in(reader) or patterns.activation_in(reader, region.modules):
        return "order", name
    return "no-activation", name
