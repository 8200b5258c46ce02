"""The qualified name of a module, which it does not know itself: found when an error needs it."""

from __future__ import annotations

import gc

from torch import nn

__all__ = ["describe", "qualified_name"]


def _parent(module: nn.Module) -> tuple[nn.Module, str] | None:
    for holder in gc.get_referrers(module):
        if not isinstance(holder, dict):
            continue
        name = next((k for k, v in holder.items() if v is module and isinstance(k, str)), None)
        if name is None:
            continue
        for owner in gc.get_referrers(holder):
            # An owner is either the module whose _modules dict this is, or (where objects keep
            # their attributes inline) that module's __dict__.
            if isinstance(owner, nn.Module) and owner._modules is holder:
                return owner, name
            if isinstance(owner, dict) and owner.get("_modules") is holder:
                for top in gc.get_referrers(owner):
                    if isinstance(top, nn.Module) and top._modules is holder:
                        return top, name
    return None


def qualified_name(module: nn.Module, depth: int = 64) -> str:
    """``'layer1.0.bn2'``: the path from the outermost module that holds ``module``, or ''.

    Walks the garbage collector's references, which is slow: for error messages only.
    """
    names: list[str] = []
    while len(names) < depth and (found := _parent(module)) is not None:
        module, name = found
        names.append(name)
    return ".".join(reversed(names))


def describe(module: nn.Module) -> str:
    """``layer 'layer1.0.bn2', BatchNorm2d(64, …)``, without the name where there is none."""
    name = qualified_name(module)
    return f"layer {name!r}, {module!r}" if name else repr(module)
