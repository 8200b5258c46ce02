"""The fused forward of one module: made from a trace, run only while that trace holds."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn
from torch.nn.modules import module as hooks

from normwise.tools.accelerate.audit import Untraceable
from normwise.tools.accelerate.inputs import Inputs, UnknownInput
from normwise.tools.accelerate.patterns import Fusion, rewrite
from normwise.tools.accelerate.regions import Region, region_of
from normwise.tools.accelerate.tracing import BASE, is_container

__all__ = ["Plan", "Plans"]

# How many ways to call a module get a graph each; what comes then runs as it was written.
LIMIT = 8

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


class _Pattern:
    """Which parameters or buffers are None: what they hold is read when the graph runs."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.none = {name: t is None for name, t in tensors.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and self.none == {n: t is None for n, t in other.items()}

    __hash__ = None  # type: ignore[assignment] # compared, never looked up


def _copied(value: Any) -> Any:
    """Containers as they are now; what they hold is compared by identity first, then by value."""
    if type(value) in (list, tuple, set, dict, OrderedDict):
        if type(value) in (dict, OrderedDict):
            return type(value)((k, _copied(v)) for k, v in value.items())
        return type(value)(map(_copied, value))
    return value


def _snapshot(module: nn.Module, watched: bool) -> dict[str, Any]:
    """``vars(module)`` as they are to stay. One comparison of two dicts, in C, takes 0.6 to 0.9 us.

    ``watched``: no hook may come.
    """
    own = dict(vars(module))
    for name, value in own.items():
        if name in ("_parameters", "_buffers"):
            own[name] = _Pattern(value) if value else {}
        elif name == "_modules":
            own[name] = dict(value)
        elif name in _HOOKS:
            own[name] = {} if watched else value
        elif name not in BASE:
            own[name] = weakref.proxy(value) if isinstance(value, Plans) else _copied(value)
    return own


def _norm_is_as_it_was(module: nn.Module, kind: type) -> bool:
    own = module.__dict__
    return module.__class__ is kind and not (
        own["activation"] is not None
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl")
    )


class Plan:
    """One trace, what it relied on, and the function made of it; None where nothing was fused."""

    def __init__(
        self,
        root: nn.Module,
        base: type[nn.Module],
        inputs: Inputs,
        region: Region | None,
        training: bool | None,
    ) -> None:
        self.inputs = inputs
        self.forward: Any = base.forward
        self.fused: dict[nn.Module, Fusion] = {}
        self.functional: list[Fusion] = []
        self.run: Callable[..., Any] | None = None
        # (module, class, snapshot); (module, attribute, value); (namespace, name, value)
        self.structure: list[tuple[nn.Module, type, dict[str, Any]]] = []
        self.attributes: list[tuple[nn.Module, str, Any]] = []
        self.globals: tuple[tuple[Any, str, Any], ...] = ()
        self.norms: list[tuple[nn.Module, type]] = []
        flag = root.training if training is None else training
        self.root = self._expected(root, False, root.training, flag)
        if region is None:
            return
        self._rely_on(root, region, flag)
        self.region = region
        fusions = region.fusions
        if not fusions:
            return
        graph = region.traced.graph
        gone: list[nn.Module] = []
        for fusion in fusions:
            gone += [region.modules[str(n.target)] for n in fusion.parts[1:]
                     if n.op == "call_module"]  # fmt: skip
            if fusion.norm.op == "call_module":
                module = region.modules[str(fusion.norm.target)]
                self.fused[module] = fusion
                self.norms.append((module, type(module)))
            else:
                self.functional.append(fusion)
        for module in dict.fromkeys(gone):
            self.structure.append(
                (module, type(module), self._expected(module, True, root.training, flag))
            )
        for fusion in fusions:
            rewrite(graph, fusion)
        self.run = _compiled(graph)

    @staticmethod
    def _expected(module: nn.Module, watched: bool, before: bool, flag: bool) -> dict[str, Any]:
        own = _snapshot(module, watched)
        if own["training"] == before:
            own["training"] = flag
        return own

    def _rely_on(self, root: nn.Module, region: Region, flag: bool) -> None:
        self.globals = region.traced.globals
        for module in region.structure:
            watched = not is_container(module)
            self.structure.append(
                (module, type(module), self._expected(module, watched, root.training, flag))
            )
        structure = {root, *region.structure}
        for module in region.modules.values():
            if module in structure:
                continue
            for name in region.traced.names.intersection(vars(module)):
                if name == "training":
                    value = flag if module.training == root.training else module.training
                    self.attributes.append((module, name, value))
                elif name not in BASE:
                    self.attributes.append((module, name, _copied(vars(module)[name])))
            tensors = {**module._parameters, **module._buffers}
            if region.traced.names.intersection(tensors):
                for name in ("_parameters", "_buffers"):
                    self.attributes.append((module, name, _Pattern(vars(module)[name])))

    def holds(self, module: nn.Module, base: Any) -> bool:
        """Whether all that the trace relied on is as it was."""
        try:
            if module.__dict__ != self.root or base.forward is not self.forward:
                return False
            for m, kind, expected in self.structure:
                if m.__dict__ != expected or m.__class__ is not kind:
                    return False
            for m, kind in self.norms:
                if not _norm_is_as_it_was(m, kind):
                    return False
            for m, name, value in self.attributes:
                if m.__dict__[name] != value:
                    return False
            for space, name, value in self.globals:
                if space[name] != value:
                    return False
        except Exception:  # a value that does not like to be compared has changed
            return False
        return True


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    graph.lint()
    code = graph.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, "<normwise.accelerate>", "exec"), space)
    run: Callable[..., Any] = space["forward"]
    return run


def _watched_globally() -> bool:
    """Hooks on all modules of the process would miss those that are fused."""
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


class Plans:
    """The plans of one module, the last used first. Copies and pickles begin anew."""

    __slots__ = ("__weakref__", "full", "plans")

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.full = False

    def __reduce__(self) -> Any:
        return Plans, ()

    def __deepcopy__(self, memo: Any) -> Plans:
        return Plans()

    def __iter__(self) -> Iterator[Plan]:
        return iter(tuple(self.plans))

    def find(
        self, module: nn.Module, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Plan | None:
        """The plan for this call, made now if need be; None where the call is to run as written."""
        if _watched_globally():
            return None
        plans = self.plans
        for plan in plans:
            if plan.inputs.fits(args, kwargs) and plan.holds(module, base):
                if plan is not plans[0]:  # a new list: other threads may be in the old one
                    self.plans = [plan, *(p for p in plans if p is not plan)]
                return plan
        if self.full:
            return None
        try:
            plan = self.make(module, base, Inputs(args, kwargs))
        except UnknownInput:
            return None
        except Untraceable as error:
            if error.reason == "profiled":
                return None
            plan = Plan(module, base, Inputs(args, kwargs), None, None)
        return plan

    def make(
        self, module: nn.Module, base: Any, inputs: Inputs, training: bool | None = None
    ) -> Plan:
        """Trace ``module`` for such a call, in the mode ``training`` or in that it is in.

        Raises:
            Untraceable: the plan, which runs the forward as written, is kept all the same.
        """
        try:
            region = region_of(module, base.forward, inputs, training)
        except Untraceable as error:
            if error.reason != "profiled":
                self.add(Plan(module, base, inputs, None, training))
            raise
        plan = Plan(module, base, inputs, region, training)
        self.add(plan)
        return plan

    def add(self, plan: Plan) -> None:
        self.plans = [plan, *self.plans]
        self.full = len(self.plans) >= LIMIT
