"""What a model does with its tensors: one run, recorded call by call.

The model runs for real, on example inputs. A ``TorchFunctionMode`` sees the calls as they are
written (``conv2d``, ``batch_norm``, ``x.view``), with the parameters they are given; below it a
``TorchDispatchMode`` sees what reaches the dispatcher some other way (TorchScript, ``torch.ops``).
Hooks on the modules tell in whose forward a call stands. That works for whatever runs: custom
classes, hooks, autocast, any container of outputs. Two things a run does not show by itself, and
the record keeps account of both:

- Another input may take another way. Who reads a *value* into Python (``if x.sum() > 0``,
  ``.item()``, ``.numpy()``) makes the forward that does it, and those around it, ``dynamic``.
- A tensor may be kept somewhere (an output, an attribute, a hook's list). Intermediate results are
  held by weak references alone: what is still alive after the run was kept.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from normwise.graph.run import Call

__all__ = ["ModuleCall", "Node", "Trace", "Value", "record"]


@dataclass(eq=False)
class Value:
    """A tensor at one moment: made by one call, changed by none.

    origin: 'input', 'parameter' (also buffers), 'call', or 'unknown' (made out of sight, or changed
    through another view of its memory).
    """

    origin: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    tensor: Tensor | None = None
    """The parameter or buffer itself."""
    maker: Node | None = None
    readers: list[Node] = field(default_factory=list)
    kept: bool = False
    """Somebody holds it after the run: it is an output, or was stored."""
    constant: Tensor | None = None
    """Integers that are the same for all inputs of this shape: ``arange(4)``, a buffer, what is
    computed from such."""


@dataclass(eq=False)
class Node:
    """One call. ``args`` and ``kwargs`` hold :class:`Value` where the call was given tensors."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inside: ModuleCall
    outputs: list[Value] = field(default_factory=list)
    writes: set[int] = field(default_factory=set)
    """Storages that the call wrote to in place."""

    @property
    def inputs(self) -> list[Value]:
        """The tensors whose numbers it reads."""
        if self.name in _MADE_LIKE:
            return []
        read: Any = self.args[:1] if self.name in _SHAPED_AS else (self.args, self.kwargs)
        return [leaf for leaf in tree_leaves(read) if isinstance(leaf, Value)]


@dataclass(eq=False)
class ModuleCall:
    """One call of one module."""

    module: nn.Module
    parent: ModuleCall | None
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    dynamic: bool = False
    """Its forward, or one inside it, read a tensor's values into Python."""

    def chain(self) -> Iterator[ModuleCall]:
        """This call and those around it, from the inside out."""
        call: ModuleCall | None = self
        while call is not None:
            yield call
            call = call.parent


@dataclass(eq=False)
class Trace:
    """The record of one run."""

    nodes: list[Node]
    calls: list[ModuleCall]
    uses: dict[int, list[Node]]
    """id of a parameter or buffer -> the calls that were given it."""
    written: set[int]
    """Storages that some call wrote to in place."""

    def calls_of(self, module: nn.Module) -> list[ModuleCall]:
        return [c for c in self.calls if c.module is module]


# Calls that tell of a tensor, not of its values.
_METADATA = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "__len__",
        "get_device", "is_floating_point", "is_complex", "is_signed", "element_size", "itemsize",
        "storage_offset", "untyped_storage", "storage", "type", "__repr__", "__hash__", "is_pinned",
        "is_same_size", "is_set_to", "__get__", "has_names", "is_shared", "is_inference",
        "is_tensor", "is_storage", "result_type", "can_cast", "promote_types", "register_hook",
        "requires_grad_", "retain_grad", "__dir__", "is_conj", "is_neg", "__reduce_ex__",
        "_is_view", "broadcast_tensors_meta", "dim_order", "is_distributed", "__delete__",
    }
)  # fmt: skip
# Calls that take the shape or the dtype of their second operand, or of their only one, no numbers.
_SHAPED_AS = frozenset({"view_as", "reshape_as", "expand_as", "type_as"})
_MADE_LIKE = frozenset(
    {"zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_empty"}
)
# Calls whose result's shape depends on values: code that asks for the shape asks for them.
_SHAPED_BY_VALUES = frozenset(
    {
        "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount",
        "combinations",
    }
)  # fmt: skip


_RANDOM = ("rand", "normal", "bernoulli", "multinomial", "poisson", "empty")


def _name(func: Callable[..., Any]) -> str:
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        namespace, _, rest = str(func).partition(".")
        name = rest.partition(".")[0]
        return name if namespace == "aten" else f"{namespace}::{name}"
    name = getattr(func, "__name__", None) or str(func)
    if name == "__get__":  # a property of Tensor: x.T, x.shape, x.data
        owner = getattr(func, "__self__", None)
        return f"get:{getattr(owner, '__name__', '?')}"
    return name


def _reads_values(node: Node) -> bool:
    masks = node.name == "__getitem__" and any(
        v.dtype in (torch.bool, torch.uint8) for v in node.inputs[1:]
    )
    wheres = node.name == "where" and len(node.args) + len(node.kwargs) == 1
    return node.name in _SHAPED_BY_VALUES or masks or wheres


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def _storage(t: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(t.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse tensors, wrapper subclasses
        return None


class _Recorder:
    def __init__(self, model: nn.Module) -> None:
        self.nodes: list[Node] = []
        self.calls: list[ModuleCall] = []
        self.stack: list[ModuleCall] = [ModuleCall(model, None)]
        self.uses: dict[int, list[Node]] = {}
        self.written: set[int] = set()
        self.known: dict[int, tuple[Callable[[], Tensor | None], Value, int]] = {}
        # The weak references keep addresses, not memory: no other storage takes their place.
        self.storages: dict[int, StorageWeakRef] = {}
        self.own: dict[int, Tensor] = {}
        self.parameters: list[Value] = []
        for t in (*model.parameters(), *model.buffers()):
            self.own[id(t)] = t
            fixed = None if t.is_floating_point() or t.is_complex() else t
            self.parameters.append(self.define(t, "parameter", tensor=t, constant=fixed))

    def define(self, t: Tensor, origin: str, **kwargs: Any) -> Value:
        storage = _storage(t)
        address = id(t) if storage is None else int(storage.cdata)
        if storage is not None:
            self.storages[address] = storage
        value = Value(origin, tuple(t.shape), t.dtype, address, **kwargs)
        self.known[id(t)] = (weakref.ref(t), value, _version(t))
        return value

    def value(self, t: Tensor) -> Value:
        entry = self.known.get(id(t))
        if entry is not None and entry[0]() is t:
            if entry[2] == _version(t):
                return entry[1]
            # Written to through another view: not what its maker made.
            self.written.add(entry[1].storage)
        return self.define(t, "unknown")

    def call(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Callable[[], Any],
    ) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        before = [(t, self.value(t), _version(t)) for t in given]
        as_values = tree_map_only(Tensor, self.value, (args, kwargs))
        result = run()
        node = Node(func, name, as_values[0], as_values[1], self.stack[-1])
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        in_place = name.endswith("_") and not name.endswith("__")
        for t, value, version in before:
            wrote = _version(t) != version
            if version == -1 and (in_place or name in ("__setitem__", "__iadd__", "__imul__")):
                wrote = t is given[0]
            if wrote:
                node.writes.add(value.storage)
                if not any(t is m for m in made):
                    made.append(t)
        if not made and (not given or name in _METADATA or name.startswith("get:")):
            return result
        read = set(node.inputs)
        for t, value, _ in before:
            if value not in read:
                continue
            value.readers.append(node)
            if id(t) in self.own:
                self.uses.setdefault(id(t), []).append(node)
        if not made or _reads_values(node):
            for call in self.stack[-1].chain():
                call.dynamic = True
        if not made:
            return result
        self.written |= node.writes
        constant = not name.startswith(_RANDOM) and all(
            v.constant is not None for _, v, _ in before
        )
        for t in made:
            # Also where a call hands its argument through (dropout in eval, x.contiguous()): from
            # here on the tensor is known as this call's result.
            value = self.define(t, "call", maker=node)
            if constant and not t.is_floating_point() and not t.is_complex():
                value.constant = t.detach().clone()
            node.outputs.append(value)
        self.nodes.append(node)
        return result

    # -- modules ----------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = ModuleCall(module, self.stack[-1])
        call.inputs = self.values_in((args, kwargs))
        self.calls.append(call)
        self.stack.append(call)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        while len(self.stack) > 1:
            call = self.stack.pop()
            if call.module is module:
                call.outputs = self.values_in(output)
                return

    def values_in(self, tree: Any) -> list[Value]:
        return [self.value(t) for t in tree_leaves(tree) if isinstance(t, Tensor)]

    def finish(self) -> Trace:
        gc.collect()
        for reference, value, _ in self.known.values():
            if value.origin in ("call", "unknown") and reference() is not None:
                value.kept = True
        self.check_constants()
        return Trace(self.nodes, self.calls, self.uses, self.written)

    def check_constants(self) -> None:
        """What is computed from a buffer that the run wrote to or replaced is not constant."""
        held = {id(t) for t in self.stack[0].module.buffers()}
        for value in self.parameters:
            if value.storage in self.written or id(value.tensor) not in held:
                value.constant = None
        for node in self.nodes:
            if any(v.constant is None for v in node.inputs):
                for v in node.outputs:
                    v.constant = None


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.depth = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}

        def run() -> Any:
            self.depth += 1
            try:
                return func(*args, **kwargs)
            finally:
                self.depth -= 1

        if self.depth:
            return run()
        if func is Tensor.__iter__:  # for row in x; a, b = x
            return iter(self.__torch_function__(torch.unbind, types, args, kwargs))
        return self.recorder.call(func, _name(func), args, kwargs, run)


class _Dispatches(TorchDispatchMode):
    """What reaches the dispatcher outside a recorded call."""

    def __init__(self, functions: _Functions) -> None:
        base: Any = super()
        base.__init__()
        self.functions = functions

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.functions.depth or func.namespace == "prim":
            return func(*args, **kwargs)
        return self.functions.recorder.call(
            func, _name(func), args, kwargs, lambda: func(*args, **kwargs)
        )


@contextlib.contextmanager
def _hooks(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    handles = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        # First to see a call, last to see its result: hooks of the user's stand inside.
        handles.append(
            module.register_forward_pre_hook(recorder.enter, prepend=True, with_kwargs=True)
        )
        handles.append(
            module.register_forward_hook(recorder.leave, with_kwargs=True, always_call=True)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(model: nn.Module, call: Call) -> Trace:
    """Run ``model`` on ``call`` without gradients, and record it. The model's hooks run too."""
    recorder = _Recorder(model)
    functions = _Functions(recorder)
    inputs = call.copy()
    for t in inputs.tensors():
        recorder.define(t, "input")
    with torch.no_grad(), _hooks(model, recorder), _Dispatches(functions), functions:
        result = inputs.run(model)
    trace = recorder.finish()
    del result
    return trace


def enclosing(nodes: Sequence[Node]) -> ModuleCall | None:
    """The innermost module call around all of ``nodes``; None if there is none."""
    common: list[ModuleCall] | None = None
    for node in nodes:
        chain = list(node.inside.chain())
        common = chain if common is None else [c for c in common if c in chain]
    return common[0] if common else None
