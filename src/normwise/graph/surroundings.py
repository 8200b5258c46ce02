"""What stands around a place in the model: owners, hooks, scopes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from normwise.graph.code import may_reach_into
from normwise.graph.reasons import Refusal
from normwise.graph.record import Node, Trace, Value, enclosing

__all__ = ["Surroundings", "has_hooks"]

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in _HOOKS)


class Surroundings:
    """The model of a trace, seen from its tensors."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model = model
        self.trace = trace
        self.paths: dict[int, str] = {}
        for path, module in model.named_modules():
            self.paths.setdefault(id(module), path)
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        self._memory: dict[int, set[int]] = {}
        for module in model.modules():
            for name, t in (*module._parameters.items(), *module._buffers.items()):
                if t is not None:
                    self._places.setdefault(id(t), []).append((module, name))
                    self._memory.setdefault(_address(t), set()).add(id(t))
        self._hooked = [c for c in trace.calls if has_hooks(c.module)]

    def path_of(self, module: nn.Module) -> str:
        return self.paths.get(id(module), "")

    def owners(self, t: Tensor) -> list[tuple[nn.Module, str]]:
        """The places at which ``t`` is registered."""
        return self._places.get(id(t), [])

    def check_own(self, tensors: Iterable[Tensor], nodes: Sequence[Node]) -> None:
        """``tensors`` may change: registered once, sharing no memory, used by ``nodes`` alone."""
        for t in tensors:
            places = self.owners(t)
            if not places:
                raise Refusal("not-a-parameter")
            owner, name = places[0]
            full = f"{self.path_of(owner)}.{name}".lstrip(".")
            if len(places) > 1 or len(self._memory[_address(t)]) > 1:
                raise Refusal("shared-weight", f"{full} is registered in several places")
            users = self.trace.uses.get(id(t), [])
            if any(u not in nodes for u in users):
                raise Refusal("shared-weight", f"{full} is used by {len(users)} calls")

    def check_hooks(self, owners: Iterable[nn.Module], changed: Iterable[Value]) -> None:
        """No hook on ``owners``, nor on a module that would be given or give ``changed``."""
        for owner in owners:
            if has_hooks(owner):
                raise Refusal("hook", f"on {self.path_of(owner) or 'the model'}")
        seen = set(changed)
        for call in self._hooked:
            if not seen.isdisjoint(call.inputs) or not seen.isdisjoint(call.outputs):
                raise Refusal("hook", f"on {self.path_of(call.module) or 'the model'}")

    def check_static(self, nodes: Sequence[Node], owners: Iterable[nn.Module]) -> None:
        """One forward holds all of ``nodes``, and its way does not depend on the data."""
        scope = enclosing(nodes)
        if scope is None or scope.dynamic:
            where = "" if scope is None else self.path_of(scope.module)
            raise Refusal("dynamic", f"in the forward of {where or 'the model'}")
        if any(c.dynamic for c in self.trace.calls_of(scope.module)):
            raise Refusal("dynamic", f"in the forward of {self.path_of(scope.module)}")
        if all(not call.dynamic for call in scope.chain()):
            return
        # On another way the code around may call these modules by itself, if it can name them.
        for call in scope.chain():
            if call is not scope and call.dynamic and may_reach_into(call.module, scope.module):
                raise Refusal("dynamic", f"{self.path_of(call.module) or 'the model'} may use "
                              f"a part of {self.path_of(scope.module)} by itself")  # fmt: skip
        inner = set(scope.module.modules())
        for module in self.model.modules():
            if module not in inner:
                for child in module.children():
                    if child is not scope.module and child in inner:
                        raise Refusal("dynamic", "part of it is also held outside")
        for owner in owners:
            if owner not in inner:
                raise Refusal("dynamic", "its weights are held outside")


def _address(t: Tensor) -> int:
    try:
        return int(t.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have no one storage: each its own
        return -id(t)
