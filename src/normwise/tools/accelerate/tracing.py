"""One forward as a graph: run on proxies, over shadows of the modules, so that nothing is touched.

``torch.fx.Tracer`` patches ``nn.Module.__call__`` for all threads, fixes Python values at what they
happen to be and drops in-place operators. This one runs ``type(module).forward`` on a *shadow*: a
shallow copy whose children are shadows too, each of which records its call instead of running, and
whose tensors are proxies, so that parameters are read when the graph runs. What the forward did
besides is found afterwards: attributes it set, proxies it kept, random numbers it drew, calls that
the audit does not know. Such a forward is refused.
"""

from __future__ import annotations

import dis
import functools
import gc
import operator
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import inplace_methods
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from normwise.tools.accelerate.audit import Audit, Untraceable, is_plain
from normwise.tools.accelerate.inputs import Inputs

__all__ = ["Traced", "is_container", "trace"]

# What every module has; its own attributes are the others.
BASE = frozenset(vars(nn.Module()))
_CALLABLE = (types.FunctionType, types.BuiltinFunctionType, type, functools.partial)


class _Unknown:
    """What stands in a shadow for a module whose call cannot be told apart from its forward."""


class _Proxy(fx.Proxy):
    """A proxy that does not lie: about its type where that is known, and about what it lacks."""

    known: type | None = None
    tracer: Any

    @property  # type: ignore[misc] # object has a setter for it
    def __class__(self) -> Any:
        file = sys._getframe(1).f_code.co_filename
        calling = self.tracer.audit.calling
        # Asked by torch's own code or by a function of torch that is given the proxy.
        if (
            file.startswith(_TORCH)
            or file == __file__
            or calling not in (None, isinstance, getattr)
        ):
            return type(self)
        if self.known is None:
            raise Untraceable("control-flow", "it asks for the type of an intermediate result")
        return self.known

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            if name.startswith("__fx") or name in ("_fields", "__torch_function__"):
                raise AttributeError(name)
            raise Untraceable("control-flow", f"it reads .{name} of a tensor")
        return _Attribute(self, name)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __iter__(self) -> Iterator[Any]:
        """``a, b = x.chunk(2)`` says how many; any other walk looks at the value."""
        caller = sys._getframe(1)
        at = caller.f_lasti
        now = next(i for i in dis.get_instructions(caller.f_code) if i.offset == at)
        del caller  # it holds what it holds
        if now.opname != "UNPACK_SEQUENCE":
            raise Untraceable("control-flow", "it walks over a tensor")
        values: Any = self
        return iter([values[i] for i in range(now.argval)])

    def __bool__(self) -> bool:
        raise Untraceable("control-flow", "it decides by a tensor")

    def __len__(self) -> int:
        raise Untraceable("control-flow", "it asks for the length of a tensor")


class _Attribute(_Proxy):
    """``x.shape``, or the method of a call that follows."""

    def __init__(self, root: fx.Proxy, name: str) -> None:
        self.root, self.name = root, name
        self.tracer = root.tracer
        self.made: fx.Node | None = None

    @property
    def node(self) -> Any:  # type: ignore[override] # made when asked for, as torch.fx's own
        if self.made is None:
            proxy = self.tracer.create_proxy("call_function", getattr, (self.root, self.name), {})
            self.made = proxy.node
        return self.made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.name, (self.root, *args), kwargs)


def _in_place(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)

    def run(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return run


for _name in inplace_methods:
    if _name != "setitem":
        setattr(_Proxy, f"__{_name}__", _in_place(_name))
_TORCH = torch.__path__[0]


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Appends to a graph; keeps account of the proxies that are alive."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self.audit = Audit(_enter.__code__)
        self.alive: list[weakref.ref[_Proxy]] = []

    def proxy(self, node: fx.Node, known: type | None = None) -> _Proxy:
        made = _Proxy(node, self)
        made.__dict__["known"] = known
        self.alive.append(weakref.ref(made))
        return made

    def holds_any(self) -> bool:
        return any(reference() is not None for reference in self.alive)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            raise Untraceable("state", "it reads a tensor that is no parameter or buffer")
        if isinstance(a, (_Unknown, nn.Module)):
            raise Untraceable("state", "it hands a module or an object to a function")
        if isinstance(a, (dict, list)) and type(a) not in (dict, list):
            raise Untraceable("control-flow", f"it makes a {type(a).__name__}")
        return super().create_arg(a)


class _Functions(TorchFunctionMode):
    """Every function of torch becomes a call in the graph, also one that was given no proxy."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if isinstance(func, torch._C.ScriptMethod):
            raise Untraceable("control-flow", "it calls TorchScript")
        kind, target = "call_function", func
        if is_tensor_method_or_property(func):
            kind, target = "call_method", func.__name__
        return self.tracer.create_proxy(kind, target, args, kwargs or {})


class _Reading(dict[str, Any]):
    """Parameters or buffers of a shadow: a read is a read in the graph."""

    def __init__(self, tensors: dict[str, Any], tracer: _Tracer, path: str) -> None:
        super().__init__(tensors)
        self.tracer, self.path = tracer, path

    def __getitem__(self, name: str) -> Any:
        if super().__getitem__(name) is None:
            return None
        return self.tracer.create_proxy("get_attr", f"{self.path}{name}", (), {})


def is_container(module: nn.Module) -> bool:
    """Without a forward: it is there to be indexed."""
    return type(module).forward is nn.Module.forward


class _Shadows:
    """The shadow of a module and of all below it."""

    def __init__(
        self, root: nn.Module, inlined: Collection[str], tracer: _Tracer, training: bool | None
    ) -> None:
        self.tracer, self.inlined, self.training = tracer, inlined, training
        self.of: dict[nn.Module, Any] = {}
        self.before: dict[nn.Module, dict[str, Any]] = {}
        self.opaque: dict[nn.Module, set[str]] = {}
        for path, module in root.named_modules():
            self.of[module] = self._start(path, module)
        for path, module in root.named_modules():
            if not isinstance(self.of[module], _Unknown):
                self._fill(path, module, root)

    def _start(self, path: str, module: nn.Module) -> Any:
        plain = type(module).__call__ is nn.Module.__call__
        if not plain or isinstance(module, torch.jit.ScriptModule):
            return _Unknown()
        return object.__new__(type(module))

    def _fill(self, path: str, module: nn.Module, root: nn.Module) -> None:
        own = dict(vars(module))
        prefix = f"{path}." if path else ""
        opaque = self.opaque[module] = set()
        for name, value in own.items():
            if name in ("_parameters", "_buffers"):
                own[name] = _Reading(value, self.tracer, prefix)
            elif name == "_modules":
                own[name] = {n: m if m is None else self.of[m] for n, m in value.items()}
            elif name not in BASE:
                own[name] = self._copied(value, f"{prefix}{name}", opaque, name)
        if self.training is not None and own["training"] == root.training:
            own["training"] = self.training
        if module is not root and not is_container(module) and path not in self.inlined:
            own["_compiled_call_impl"] = self._recorder(path)
        self.of[module].__dict__.update(own)
        self.before[module] = {n: _identities(v) for n, v in own.items()}

    def _copied(self, value: Any, path: str, opaque: set[str], name: str) -> Any:
        if isinstance(value, Tensor):
            return self.tracer.create_proxy("get_attr", path, (), {})
        if isinstance(value, nn.Module):
            found = self.of.get(value)
            if found is None:
                opaque.add(name)
            return value if found is None else found
        if type(value) in (list, tuple, set):
            if any(isinstance(v, Tensor) for v in value):
                opaque.add(name)
                return value
            return type(value)(self._copied(v, path, opaque, name) for v in value)
        if type(value) in (dict, OrderedDict):
            if any(isinstance(v, Tensor) for v in value.values()):
                opaque.add(name)
                return value
            return type(value)((k, self._copied(v, path, opaque, name)) for k, v in value.items())
        if not (is_plain(value) or isinstance(value, _CALLABLE)):
            opaque.add(name)
        return value

    def _recorder(self, path: str) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            for leaf in (*args, *kwargs.values()):
                if isinstance(leaf, (list, dict, set)):
                    raise Untraceable("control-flow", f"{path} is given a list or a dict")
            return self.tracer.create_proxy("call_module", path, args, kwargs)

        return record

    def check(self, names: Collection[str]) -> None:
        """Nothing was set, and nothing was read that could change unseen."""
        for module, before in self.before.items():
            now = vars(self.of[module])
            if before.keys() != now.keys():
                raise Untraceable("state", "it sets an attribute")
            for name, value in before.items():
                if _identities(now[name]) != value:
                    raise Untraceable("state", f"it sets or changes the attribute {name}")
            read = self.opaque[module].intersection(names)
            if read:
                raise Untraceable("state", f"it reads the attribute {min(read)}, an object")

    def forget(self) -> None:
        for shadow in self.of.values():
            shadow.__dict__.clear()


def _identities(value: Any) -> Any:
    """What tells later whether an attribute was set, or a container changed."""
    if isinstance(value, (list, set)):
        return [id(v) for v in value]
    if isinstance(value, dict):
        return [(k, id(v)) for k, v in dict.items(value)]
    return id(value)


@dataclass
class Traced:
    """A forward as a graph over the module's own names, and what the trace relied on.

    names: all that the code named. globals: (namespace, name, value) of plain globals it read.
    """

    graph: fx.Graph
    names: frozenset[str]
    globals: tuple[tuple[dict[str, Any], str, Any], ...]


def _enter(forward: Any, shadow: Any, args: Any, kwargs: Any) -> Any:
    return forward(shadow, *args, **kwargs)


def _check_result(result: Any, given: Collection[int]) -> None:
    if isinstance(result, (list, dict, tuple)):
        if type(result) not in (list, dict, tuple) and not hasattr(result, "_fields"):
            raise Untraceable("control-flow", f"it returns a {type(result).__name__}")
        if id(result) in given:
            raise Untraceable("control-flow", "it returns a container that it was given")
        for item in result.values() if isinstance(result, dict) else result:
            _check_result(item, given)
    elif not (type(result) in (_Proxy, _Attribute) or is_plain(result)):
        raise Untraceable("control-flow", f"it returns a {type(result).__name__}")


def trace(
    root: nn.Module,
    forward: Callable[..., Any],
    inputs: Inputs,
    inlined: Collection[str] = (),
    training: bool | None = None,
) -> Traced:
    """The graph of ``forward(root, ...)``; children at the paths ``inlined`` run, others are calls.

    ``training``: as it would be with that flag on the module and on those of its descendants
    that agree with it now.

    Raises:
        Untraceable: where a graph would not be the same function in all cases.
    """
    graph = fx.Graph()
    tracer = _Tracer(graph)
    audit = tracer.audit
    nodes = [graph.placeholder(f"input_{i}") for i in range(inputs.count)]
    shadows = _Shadows(root, inlined, tracer, training)
    tracer.alive.clear()
    args, kwargs = inputs.build([tracer.proxy(node, Tensor) for node in nodes])
    given = {id(t): _identities(t) for t in (*_containers(args), *_containers(kwargs))}
    try:
        with _Functions(tracer), audit.watching():
            result = _enter(forward, shadows.of[root], args, kwargs)
        after = {id(t): _identities(t) for t in (*_containers(args), *_containers(kwargs))}
        if after != given:
            raise Untraceable("state", "it changes a list that it is given")
        _check_result(result, given)
        graph.output(tracer.create_arg(result))
        shadows.check(audit.names)
    except Untraceable:
        raise
    except Exception as error:
        if audit.refusal is not None:
            raise audit.refusal from error
        raise Untraceable("control-flow", f"{type(error).__name__}: {error}") from None
    finally:
        shadows.forget()
    del result, args, kwargs
    if tracer.holds_any():
        gc.collect()
        if tracer.holds_any():
            raise Untraceable("state", "it keeps a tensor")
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return Traced(graph, frozenset(audit.names), tuple(audit.globals))


def _containers(tree: Any) -> Iterator[Any]:
    if type(tree) in (list, tuple, dict):
        yield tree
        for item in tree.values() if type(tree) is dict else tree:
            yield from _containers(item)
