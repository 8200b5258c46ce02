"""The exceptions of normwise. Each message states the invariant, what came, and what to try.

The classes inherit from the built-in exceptions that ``torch.nn`` raises in the same place, so an
``except ValueError`` or ``except RuntimeError`` written for torch.nn goes on working.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CollectiveError",
    "DtypeError",
    "InputError",
    "MissingDependencyError",
    "NonFiniteError",
    "NormwiseError",
    "OutputError",
    "message",
]


class NormwiseError(Exception):
    """Base of every error that normwise raises on purpose."""


class InputError(NormwiseError, ValueError, RuntimeError):
    """A shape, rank, size or option that breaks an invariant of the call."""


class DtypeError(NormwiseError, TypeError, NotImplementedError):
    """A tensor whose dtype the call does not take (torch.nn: NotImplementedError, RuntimeError)."""


class MissingDependencyError(NormwiseError, ImportError):
    """A package that an extra (``demo``, ``export``) brings and that cannot be imported."""


class NonFiniteError(NormwiseError, ArithmeticError, RuntimeError):
    """``nonfinite='raise'`` met a batch whose statistics are not finite."""


class CollectiveError(NormwiseError, RuntimeError):
    """A collective of a synchronised norm failed or timed out; names the layer that waited."""


class CheckpointError(NormwiseError, ValueError):
    """A checkpoint that cannot be read, or not safely: damaged, foreign, or wanting to run code."""


class OutputError(NormwiseError, OSError):
    """A file or a directory that cannot be made or written to."""


def message(invariant: str, got: str, hint: str) -> str:
    """One form for all errors: ``<invariant>; got <got>. Try: <hint>.``"""
    return f"{invariant}; got {got}. Try: {hint}."
