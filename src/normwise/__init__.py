"""normwise: batch normalization done right, for people who train and ship PyTorch models.

``import normwise as nw``; ``nw.nn.BatchNorm2d(64)`` replaces ``torch.nn.BatchNorm2d(64)``.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from normwise import errors, functional, nn
from normwise.moments import Moments
from normwise.nn.modes import (
    accumulate_statistics,
    checkpoint_contexts,
    domain,
    hold_statistics,
)
from normwise.ops import backends

if TYPE_CHECKING:
    from normwise import plots
    from normwise.doctor import check, repair
    from normwise.graph import fold, load_folded
    from normwise.tools.accelerate import accelerate
    from normwise.tools.allocator import tune_allocator
    from normwise.tools.convert import convert
    from normwise.tools.equalization import equalize
    from normwise.tools.memory import memory_saver
    from normwise.tools.quantization import quantization_report
    from normwise.tools.recalibrate import recalibrate
    from normwise.tools.watch import watch

try:
    __version__ = version("normwise")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "__version__",
    "Moments",
    "accelerate",
    "accumulate_statistics",
    "backends",
    "check",
    "checkpoint_contexts",
    "convert",
    "domain",
    "equalize",
    "errors",
    "fold",
    "functional",
    "hold_statistics",
    "load_folded",
    "memory_saver",
    "nn",
    "plots",
    "quantization_report",
    "recalibrate",
    "repair",
    "tune_allocator",
    "watch",
]

# Tools are loaded when they are first asked for: ``import normwise`` loads the layers alone.
_TOOLS = {
    "accelerate": "normwise.tools.accelerate",
    "check": "normwise.doctor",
    "convert": "normwise.tools.convert",
    "equalize": "normwise.tools.equalization",
    "fold": "normwise.graph",
    "load_folded": "normwise.graph",
    "memory_saver": "normwise.tools.memory",
    "quantization_report": "normwise.tools.quantization",
    "recalibrate": "normwise.tools.recalibrate",
    "repair": "normwise.doctor",
    "tune_allocator": "normwise.tools.allocator",
    "watch": "normwise.tools.watch",
}


def __getattr__(name: str) -> Any:
    if name == "plots":  # needs matplotlib
        return import_module("normwise.plots")
    if name not in _TOOLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_TOOLS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_TOOLS, "plots"})
