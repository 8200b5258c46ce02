"""How much of a model one graph takes in: a module's own forward, and of its children only those
that a row of norm, addition and activation reaches into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from normwise.tools.accelerate import patterns
from normwise.tools.accelerate.audit import Untraceable
from normwise.tools.accelerate.inputs import Inputs, UnknownInput
from normwise.tools.accelerate.patterns import Fusion
from normwise.tools.accelerate.tracing import Traced, is_container, trace

__all__ = ["Region", "Search", "has_own_code", "region_of"]


@dataclass
class Region:
    """A trace with its fusions.

    modules: path -> module below the root. structure: those whose state is part of the trace: run
    inside it, or passed through on the way to one that is called.
    """

    traced: Traced
    modules: dict[str, nn.Module]
    fusions: list[Fusion]
    structure: list[nn.Module]


# Known by what they are; and those that make classes of their own when they are copied.
_CLOSED = ("torch.nn.", "torch.ao.", "torch.jit.", "normwise.nn.")


def has_own_code(module: nn.Module) -> bool:
    """Whether there is a forward to look into: the user's, or that of a Sequential."""
    if isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)) or is_container(module):
        return False
    if type(module).forward is nn.Sequential.forward:
        return True
    return not type(module).__module__.startswith(_CLOSED)


class Search:
    """Looks for children to run inside the trace of their parent."""

    def __init__(self, training: bool | None) -> None:
        self.training = training
        self.ends: dict[nn.Module, tuple[bool, bool]] = {}

    def _may_run_inside(self, module: nn.Module) -> bool:
        plain = type(module).__call__ is nn.Module.__call__
        return plain and has_own_code(module) and patterns.unhooked(module)

    def look_into(self, module: nn.Module, count: int) -> tuple[bool, bool]:
        """(whether it begins with an activation, whether it ends with a norm that has none)."""
        if module not in self.ends:
            self.ends[module] = (False, False)
            if self._may_run_inside(module):
                try:
                    inputs = Inputs((Tensor(),) * count, {})
                    forward = type(module).forward
                    graph = trace(module, forward, inputs, (), self.training).graph
                except (Untraceable, UnknownInput):
                    return False, False
                modules = dict(module.named_modules())
                first = next(iter(graph.nodes))
                begins = first.op == "placeholder" and self._begins(first, modules)
                self.ends[module] = begins, self._ends(graph, modules)
        return self.ends[module]

    def _begins(self, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
        reader = patterns.reader_of(node)
        if reader is None:
            return False
        if patterns.activation_in(reader, modules) is not None:
            return True
        child = self.child(reader, modules)
        return child is not None and self.look_into(child, 1)[0]

    def _ends(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> bool:
        result = next(iter(reversed(graph.nodes))).args[0]
        return isinstance(result, fx.Node) and self.is_open(result, modules)

    def is_open(self, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
        """Whether ``node`` is a norm's result, perhaps with a residual, read once."""
        if len(node.users) != 1:
            return False
        operands = patterns.addition_in(node)
        if operands is not None:
            return any(self.is_open(n, modules) for n in operands[:2])
        child = self.child(node, modules)
        if child is not None:
            return self.look_into(child, len(node.args))[1]
        return patterns.is_norm(node, modules)

    def child(self, node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
        """The module that ``node`` calls, if it may run inside the trace."""
        if node.op != "call_module" or node.kwargs or not node.args:
            return None
        module = modules[str(node.target)]
        return module if self._may_run_inside(module) else None

    def reached(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> set[str]:
        """Paths of the children that a row of norm, addition and activation reaches into."""
        found = set()
        order = {node: i for i, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            child = self.child(node, modules)
            if child is None:
                continue
            reader = patterns.reader_of(node)
            if reader is not None and self.is_open(node, modules):
                operands = patterns.addition_in(reader)
                if operands is not None:
                    # One norm takes the addition: the last that can.
                    can = [n for n in operands[:2] if self.is_open(n, modules)]
                    if max(can, key=order.__getitem__) is node:
                        found.add(str(node.target))
                elif patterns.activation_in(reader, modules) is not None:
                    found.add(str(node.target))
            source = node.args[0]
            if (
                isinstance(source, fx.Node)
                and self.is_open(source, modules)
                and self.look_into(child, len(node.args))[0]
            ):
                found.add(str(node.target))
                inner = self.child(source, modules)
                if inner is not None:
                    found.add(str(source.target))
        return found


def region_of(
    root: nn.Module,
    forward: Callable[..., Any],
    inputs: Inputs,
    training: bool | None = None,
    search: Search | None = None,
) -> Region:
    """The region of ``root``; ``search`` of the same mode knows what other regions looked into.

    Raises:
        Untraceable: if its own forward cannot be traced.
    """
    modules = dict(root.named_modules())
    search = search or Search(training)
    inlined: set[str] = set()
    traced = trace(root, forward, inputs, inlined, training)
    while more := search.reached(traced.graph, modules) - inlined:
        try:
            traced = trace(root, forward, inputs, inlined | more, training)
        except Untraceable:  # each alone can be traced; together they stay calls
            break
        inlined |= more
    fusions = patterns.find(traced.graph, modules)
    return Region(traced, modules, fusions, list(_structure(root, traced, modules, inlined)))


def _structure(
    root: nn.Module, traced: Traced, modules: dict[str, nn.Module], inlined: set[str]
) -> Iterator[nn.Module]:
    paths = set(inlined)
    for node in traced.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            parts = str(node.target).split(".")[:-1]
            paths.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    seen = {root}
    for path in sorted(paths):
        module = modules.get(path)
        if module is not None and module not in seen:
            seen.add(module)
            yield module
    # Lists and dicts of modules, which a forward may have walked through.
    todo = [*seen]
    while todo:
        for child in todo.pop().children():
            if is_container(child) and child not in seen:
                seen.add(child)
                todo.append(child)
                yield child
