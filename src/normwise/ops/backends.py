"""``normwise.backends()``: which backends can serve a call here, and why one cannot."""

from __future__ import annotations

from typing import NamedTuple

from normwise.ops import cpu

__all__ = ["BackendStatus", "Backends", "backends"]


class BackendStatus(NamedTuple):
    """One backend: whether it can be used, and in a sentence what it is or what it lacks."""

    name: str
    available: bool
    detail: str


class Backends(dict[str, BackendStatus]):
    """``{name: BackendStatus}``; prints as a small table."""

    def __str__(self) -> str:
        return "\n".join(
            f"{s.name:<10} {'yes' if s.available else 'no ':<4} {s.detail}" for s in self.values()
        )

    __repr__ = __str__


def backends() -> Backends:
    """The backends in the order in which they are asked.

    Example:
        >>> import normwise as nw
        >>> nw.backends()["reference"].available
        True
    """
    status = cpu.status()
    return Backends(
        cpu=BackendStatus("cpu", *status),
        reference=BackendStatus(
            "reference", True, "plain PyTorch: every device and dtype, masks, higher derivatives"
        ),
    )
