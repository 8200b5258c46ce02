"""Cases of the doctor's rules: one module a rule, named as the rule's own file.

A module holds ``FIRES`` and ``QUIET``, name -> function that makes a :class:`Case`, and
``digits(model, data)``, which makes the fault on a copy of a small trained network (``data`` is the
DataLoader that it was trained on). What is expected stands in the case.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Case", "Cases", "modules", "net", "norm", "spread"]


@dataclass(frozen=True)
class Case:
    """What ``check`` gets, ``check(subject, **kwargs)``, and what the rule shall say.

    expect: (layer, severity) of the rule's findings, no more and no fewer; empty for a quiet case.
    figures: of the evidence; a finding must hold each (numbers to 1e-3).
    """

    subject: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    expect: frozenset[tuple[str, str]] | set[tuple[str, str]] = frozenset()
    figures: Mapping[str, Any] = field(default_factory=dict)


Cases = dict[str, Callable[[], Case]]


def modules() -> dict[str, ModuleType]:
    """By the code of the rule."""
    found = {}
    for entry in pkgutil.iter_modules(__path__):
        found[entry.name.split("_")[0].upper()] = importlib.import_module(f"doctor.{entry.name}")
    return found


def spread(n: int, low: float, high: float) -> Tensor:
    """``n`` different values from ``low`` to ``high``."""
    return torch.linspace(low, high, n)


@torch.no_grad()
def norm(n: int = 8, kind: type[nn.Module] = nn.BatchNorm2d, /, **held: Any) -> Any:
    """A batch norm as after 1,000 steps of a sound training; ``held`` replaces tensors (a number
    for all channels) and attributes."""
    made: Any = kind(n)
    values = {
        "weight": spread(n, 0.6, 1.4),
        "bias": spread(n, -0.5, 0.5),
        "running_mean": spread(n, -1.0, 1.5),
        "running_var": spread(n, 0.5, 2.0),
        "num_batches_tracked": 1000,
        **held,
    }
    for name, value in values.items():
        own = getattr(made, name)
        if isinstance(own, Tensor):
            own.copy_(torch.as_tensor(value).expand_as(own))
        else:
            setattr(made, name, value)
    return made


class _Net(nn.Sequential):
    def __init__(self, norms: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in norms.items():
            self.add_module(name, module)


def net(**norms: nn.Module) -> nn.Module:
    """A model that holds these norms under these names."""
    return _Net(norms)
