"""What is measured: shape × layout × dtype × phase × fused.

The cross product has about 1,500 cases, hours of work for two cores once ``torch.compile`` takes
part in each.  So there are three selections: `QUICK` (a smoke run), `DEFAULT` (what ``make bench``
runs) and `FULL` (the cross product); the command line narrows any of them further.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

LAYOUTS = ("contiguous", "channels_last")
DTYPES = ("float32", "bfloat16", "float16", "float64")
PHASES = ("forward", "backward", "eval")
FUSED = ("none", "relu", "add+relu")
SUITES = ("resnet50", "ranks", "tiny")

QUICK, DEFAULT, FULL = "quick", "default", "full"
SELECTIONS = (QUICK, DEFAULT, FULL)

_ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time; `layers` is how many layers of the network have this shape."""

    suite: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: str = "float32"
    phase: str = "forward"
    fused: str = "none"
    layers: int = 1

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.suite}/{size}/{self.layout}/{self.dtype}/{self.phase}/{self.fused}"

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        """Size of the tensor: the unit in which the floor counts."""
        return math.prod(self.shape) * _ITEMSIZE[self.dtype]

    @property
    def megabytes(self) -> float:
        return self.nbytes / 1e6

    @property
    def channel_is_innermost(self) -> bool:
        """Neighbours in memory belong to different channels, as in NHWC and in plain (N, C)."""
        return self.layout == "channels_last" or len(self.shape) == 2

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Case:
        return cls(**{**fields, "shape": tuple(fields["shape"])})


def resnet50_shapes(batch: int = 32, image: int = 224) -> Counter[tuple[int, int, int, int]]:
    """Input shape of each batch norm of ResNet-50, with the number of layers that have it.

    ResNet-50 as torchvision has it ("v1.5"): a stage's stride stands in the 3×3 convolution of its
    first block, so that block's first batch norm still sees the larger picture.  53 layers in all.
    """
    shapes: Counter[tuple[int, int, int, int]] = Counter()
    size = image // 2
    shapes[batch, 64, size, size] += 1  # the stem
    size //= 2  # max pooling
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            reduced = size // 2 if stage > 0 and block == 0 else size
            shapes[batch, width, size, size] += 1  # after 1×1
            shapes[batch, width, reduced, reduced] += 1  # after 3×3
            shapes[batch, 4 * width, reduced, reduced] += 1  # after 1×1, before the addition
            if block == 0:
                shapes[batch, 4 * width, reduced, reduced] += 1  # the projected shortcut
            size = reduced
    return shapes


# Multilayer perceptrons' batches, and pictures of a few hundred numbers: here the cost is the
# call, not the memory.  (60, 100) is the network of the batch norm paper's figure 1.
_PERCEPTRON = (32, 64)
_TINY: tuple[tuple[int, ...], ...] = (
    _PERCEPTRON,
    (60, 100),
    (128, 256),
    (16, 32, 10),
    (2, 8, 4, 4),
    (8, 16, 8, 8),
    (4, 8, 2, 4, 4),
)

# Sequences, volumes, and a wide perceptron, from what fits in L2 to what fits in no cache.
_RANKS: tuple[tuple[int, ...], ...] = (
    (4096, 2048),
    (16, 256, 128),
    (32, 256, 1000),
    (2, 32, 8, 28, 28),
    (4, 64, 16, 56, 56),
)

# Where a selection takes only a few of ResNet-50's shapes: one larger than any usual cache, one
# that fits in a last-level cache, and one with little space and many channels.
_PROBES = ((32, 512, 28, 28), (32, 256, 14, 14), (32, 2048, 7, 7))


def _layouts(shape: Sequence[int]) -> tuple[str, ...]:
    """(N, C) and (N, C, L) have no channels_last memory format in PyTorch."""
    return LAYOUTS if len(shape) >= 4 else LAYOUTS[:1]


def _everything() -> Iterator[Case]:
    sizes: list[tuple[str, tuple[int, ...], int]] = [
        *(("resnet50", shape, layers) for shape, layers in resnet50_shapes().items()),
        *(("ranks", shape, 1) for shape in _RANKS),
        *(("tiny", shape, 1) for shape in _TINY),
    ]
    for suite, shape, layers in sizes:
        for layout in _layouts(shape):
            for dtype in DTYPES:
                for fused in FUSED:
                    for phase in PHASES:
                        yield Case(suite, shape, layout, dtype, phase, fused, layers)


def _in_default(case: Case) -> bool:
    probe = case.shape in _PROBES
    if case.suite != "resnet50":
        return case.dtype == "float32" and case.fused != "relu"
    if case.dtype == "float32":
        return case.fused != "relu" or probe
    if case.dtype == "bfloat16":
        return case.fused == "none" and (probe or case.phase != "eval")
    return case.fused == "none" and case.phase != "eval" and case.shape in _PROBES[:2]


def _in_quick(case: Case) -> bool:
    few = (*_PROBES[:2], _PERCEPTRON, (8, 16, 8, 8))
    return case.dtype == "float32" and case.fused != "relu" and case.shape in few


_RULES: dict[str, Callable[[Case], bool]] = {
    QUICK: _in_quick,
    DEFAULT: _in_default,
    FULL: lambda case: True,
}


def select(
    selection: str = DEFAULT,
    *,
    suite: str = "all",
    text: str = "",
    phase: str | None = None,
    layout: str | None = None,
    dtype: str | None = None,
) -> list[Case]:
    """The cases of a selection, narrowed; `text` is looked for in the case's name."""
    rule = _RULES[selection]
    return [
        case
        for case in _everything()
        if rule(case)
        and suite in ("all", case.suite)
        and text in case.name
        and phase in (None, case.phase)
        and layout in (None, case.layout)
        and dtype in (None, case.dtype)
    ]


def compiled(case: Case, selection: str) -> bool:
    """Whether ``torch.compile`` takes part: rarely, as each compilation costs seconds."""
    if selection == FULL:
        return True
    if case.dtype != "float32" or case.fused != "none":
        return False
    if selection == DEFAULT:
        return case.shape in (*_PROBES[:2], _PERCEPTRON)
    return (case.shape, case.layout, case.phase) == (_PROBES[1], "contiguous", "forward")
