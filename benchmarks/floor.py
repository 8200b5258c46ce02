"""The floor: the least time in which the bytes that must move can move.

Batch norm does next to no arithmetic, so its limit is bytes over bandwidth.  The unit is the size
of the case's tensor; a copy moves 2 (one read, one write).  The bandwidth is that of a copy of the
same size and layout, timed in the same rounds as the contenders: it sees the same caches and the
same noise, and needs no figure from a data sheet.

=================  ==================================  =======================================
phase              channel is a run of memory (NCHW)   channel is innermost (NHWC, plain (N, C))
=================  ==================================  =======================================
training forward   2: x, y                             3: x twice, y
backward           3: x, dy, dx                        5: x and dy twice, dx
eval forward       2: x, y                             2: x, y
=================  ==================================  =======================================

Training needs a channel's statistics before it can write its first output.  In NCHW one channel
fits in a cache and is read from memory once; in NHWC the first channel ends where the tensor ends,
so it is read twice (and a tensor that fits in the last-level cache may beat this floor).

A residual adds one read forward.  Residual and ReLU together add one read (the residual, or the
output, to know where the ReLU was open) and one write (the residual's gradient) backward.  A ReLU
alone adds nothing: its mask follows from x.
"""

from __future__ import annotations

from .cases import Case

COPY_UNITS = 2

_UNITS = {  # phase: (channel is a run of memory, channel is innermost)
    "forward": (2, 3),
    "backward": (3, 5),
    "eval": (2, 2),
}


def units(case: Case) -> int:
    """How many times the tensor's size must move between memory and the processor."""
    least = _UNITS[case.phase][case.channel_is_innermost]
    if case.fused == "add+relu":
        least += 2 if case.phase == "backward" else 1
    return least


def floor_seconds(case: Case, copy_seconds: float) -> float:
    """Time for the case's bytes at the bandwidth of a copy that took `copy_seconds`."""
    return copy_seconds * units(case) / COPY_UNITS


def copy_bandwidth(case: Case, copy_seconds: float) -> float:
    """Bytes a second, read and written."""
    return COPY_UNITS * case.nbytes / copy_seconds
