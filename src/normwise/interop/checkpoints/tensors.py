"""A tensor in a file: where its bytes lie, and the way from there to a tensor."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from normwise.interop.checkpoints.file import Region
from normwise.interop.checkpoints.limits import EXPANDED, NAME, RANK, is_size, numel, shown

__all__ = ["DTYPES", "Stored", "TensorInfo", "strides_of"]

# Names as torch spells them; what this torch lacks is left out (it grows: float8 in 2.1).
DTYPES = {
    name: dtype
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "complex128", "complex64",
        "complex32", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
        "bool",
    )
    if (dtype := getattr(torch, name, None)) is not None
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of a tensor, before it is read; ``dtype`` None if torch has no such."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the dense tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Stored(TensorInfo):
    """Elements in ``region``, the first at ``offset`` (in elements), in the given byte order."""

    region: Region = field(repr=False, compare=False)
    strides: tuple[int, ...]
    offset: int = 0
    order: str = "little"

    def checked(self, name: str) -> Stored:
        """Itself, once all its elements are known to lie in the region."""
        sizes = (*self.shape, *self.strides, self.offset)
        if len(name) > NAME or len(self.shape) > RANK or len(self.shape) != len(self.strides):
            self.region.refuse(f"a tensor with a name or a shape out of bounds, {shown(name)}")
        if not all(map(is_size, sizes)):
            self.region.refuse(f"sizes or strides of {shown(name)} that are no sizes")
        if self.dtype is None:
            return self
        stored = self.region.size // self.dtype.itemsize
        claimed = numel(self.shape)
        if claimed and self.offset + self.span > stored:
            self.region.refuse(
                f"{shown(name)} with element {self.offset + self.span - 1} of the {stored} that "
                "are stored: it was cut short or damaged"
            )
        if claimed > max(stored, EXPANDED // self.dtype.itemsize):
            self.region.refuse(f"{shown(name)} of {claimed} elements, of which {stored} are stored")
        return self

    @property
    def span(self) -> int:
        """Elements from the first to the last."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    @property
    def nbytes(self) -> int:
        return numel(self.shape) * (self.dtype.itemsize if self.dtype else 1)

    def load(self, name: str) -> Tensor:
        if self.dtype is None:
            self.region.refuse(
                f"{shown(name)} in a dtype that torch {torch.__version__} does not have",
                "a later torch",
            )
        if numel(self.shape) == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        item = self.dtype.itemsize
        data = self.region.read(self.offset * item, self.span * item, f"the tensor {shown(name)}")
        unit = item // 2 if self.dtype.is_complex else item
        if self.order != sys.byteorder and unit > 1:
            np.frombuffer(data, dtype=f"u{unit}").byteswap(inplace=True)
        # A bool of another value than 0 and 1 would be neither true nor false.
        kind = torch.uint8 if self.dtype == torch.bool else self.dtype
        flat = torch.frombuffer(data, dtype=kind)
        flat = flat != 0 if self.dtype == torch.bool else flat
        return flat.as_strided(self.shape, self.strides)
