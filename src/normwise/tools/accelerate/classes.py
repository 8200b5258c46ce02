"""The class that an accelerated module gets: its own, with a forward that may be the fused one.

A class and not an attribute of the instance: whoever copies or replicates a module (``deepcopy``,
``copy``, DataParallel, pickle) takes the class along, and the forward is called with the copy. It
has the name of the class that it stands for.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import nn

from normwise.tools.accelerate.plans import Plans

__all__ = ["PLANS", "base_of", "install", "is_accelerated"]

PLANS = "_normwise_plans"

_made: weakref.WeakValueDictionary[type, Any] = weakref.WeakValueDictionary()


def _class_of(base: Any) -> Any:
    """The accelerated class over ``base``."""
    found = _made.get(base)
    if found is not None:
        return found

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A compiler or a recorder is to see the calls as they were written.
        if (
            torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or torch._C._len_torch_function_stack() > 0
        ):
            return base.forward(self, *args, **kwargs)
        plans = self.__dict__.get(PLANS)
        if plans is None:  # made by the class itself, as a slice of a Sequential is
            plans = self.__dict__[PLANS] = Plans()
        plan = plans.find(self, base, args, kwargs)
        if plan is None or plan.run is None:
            return base.forward(self, *args, **kwargs)
        return plan.run(self, *plan.inputs.flat(args, kwargs))

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = super(made, self).__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and made in reduced[1]:
            plain = tuple(base if a is made else a for a in reduced[1])
            return (_rebuilt, (reduced[0], *plain), *reduced[2:])
        return reduced

    body = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_accelerated_base": base,
    }
    made: Any = type(base)(base.__name__, (base,), body)
    _made[base] = made
    return made


def _rebuilt(make: Any, *args: Any) -> Any:
    """An unpickled module: made by its own class, then accelerated again."""
    module = make(*args)
    if not is_accelerated(module):
        module.__class__ = _class_of(type(module))
    return module


def is_accelerated(module: nn.Module) -> bool:
    return "_accelerated_base" in type(module).__dict__


def base_of(module: nn.Module) -> Any:
    """The class that a module had when it was written."""
    kind: Any = type(module)
    return kind.__dict__.get("_accelerated_base", kind)


def install(module: Any, plans: Plans) -> None:
    """Give ``module`` the fused forward, with the plans made so far."""
    if not is_accelerated(module):
        module.__class__ = _class_of(type(module))
    module.__dict__[PLANS] = plans
