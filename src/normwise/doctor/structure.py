"""The graph of one run of the model, as the rules of structure read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from normwise.graph.norms import Norm, Site, find_norms
from normwise.graph.record import Node, Trace, Value, record
from normwise.graph.run import Call, copy_of, same_random_numbers

__all__ = ["Structure"]

# Calls that hand a tensor on: same numbers, another shape at most.
_PASSES_ON = frozenset(
    {
        "contiguous", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "to",
        "float", "identity", "clone", "detach",
    }
)  # fmt: skip


@dataclass(eq=False)
class Structure:
    """A recorded run in eval mode of a copy of the model; what it holds are the copy's modules,
    under the same names.

    model: the copy. trace: the run. norms: the batch norms that ran, each with its calls (sites).
    """

    model: nn.Module
    trace: Trace
    norms: list[Norm]

    @classmethod
    def of(cls, model: nn.Module, call: Call) -> Structure:
        """Run and record a copy of ``model``.

        Raises:
            InputError: if it cannot be copied.
            Exception: what the forward raises.
        """
        twin = copy_of(model).eval()
        with same_random_numbers():
            trace = record(twin, call)
        paths: dict[int, str] = {}
        for path, module in twin.named_modules():
            paths.setdefault(id(module), path)
        return cls(twin, trace, find_norms(twin, trace, lambda m: paths.get(id(m), "")))

    @cached_property
    def paths(self) -> dict[int, str]:
        """id of a module of the copy -> its first name."""
        found: dict[int, str] = {}
        for path, module in self.model.named_modules():
            found.setdefault(id(module), path)
        return found

    def path_of(self, module: nn.Module | None) -> str:
        return "" if module is None else self.paths.get(id(module), "")

    def sites(self) -> Iterator[tuple[Norm, Site]]:
        """Every call of every norm."""
        return ((norm, site) for norm in self.norms for site in norm.sites)

    def before(self, value: Value) -> Iterator[Node]:
        """The call that made ``value``; where that only hands on or drops out, the one before it
        too, and so on: nearest first."""
        node = value.maker
        while node is not None:
            yield node
            if (node.name not in _PASSES_ON and "dropout" not in node.name) or not node.inputs:
                return
            node = node.inputs[0].maker

    def after(self, value: Value) -> list[Node]:
        """The calls that read ``value``, looking through those that hand it on."""
        found: list[Node] = []
        for node in value.readers:
            if node.name in _PASSES_ON and node.outputs:
                found += self.after(node.outputs[0])
            else:
                found.append(node)
        return found

    def module_of(self, node: Node) -> nn.Module | None:
        """The module in whose own forward the call stands; None for the model itself."""
        module = node.inside.module
        return None if module is self.model else module
