"""Moments: count, mean and sum of squared deviations of a set of numbers, and how sets merge.

Everything in normwise is an operation on moments; this module is the arithmetic and imports
nothing but torch. Sums of squares minus squared means appear nowhere: with mean 1000 and variance
0.01 they return garbage in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normwise.errors import DtypeError, InputError, message

__all__ = ["Moments", "accumulation_dtype"]


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which statistics of ``x`` are taken: float64 where the device has it.

    A float32 mean of data around 1e6 with standard deviation 1 is off by up to 0.03 standard
    deviations from rounding alone; the per-channel vectors cost nothing in float64.
    """
    if x.dtype == torch.float64 or x.device.type in ("cpu", "cuda", "meta", "xpu"):
        return torch.float64
    return torch.float32


def _axis(dim: int, rank: int) -> int:
    if not -rank <= dim < rank:
        raise InputError(
            message(
                "dim names an axis",
                f"dim={dim} for rank {rank}",
                f"a number from {-rank} to {rank - 1}" if rank else "a tensor with an axis",
            )
        )
    return dim + rank if dim < 0 else dim


@dataclass(frozen=True, eq=False)
class Moments:
    r"""Count :math:`n`, mean :math:`\mu` and :math:`M_2=\sum_i (x_i-\mu)^2` of sets of numbers.

    Two disjoint sets merge exactly, whatever their sizes (Chan, Golub & LeVeque 1979, eq. 2.1):

    .. math::
        n = n_a + n_b,\quad \delta = \mu_b - \mu_a,\quad
        \mu = \mu_a + \delta\,\frac{n_b}{n},\quad
        M_2 = M_{2,a} + M_{2,b} + \delta^2\,\frac{n_a n_b}{n}

    Args:
        count: how many numbers; an int or an integer tensor that broadcasts against ``mean``
            (one count for all channels, or one for each). Kept as int64, so it is exact.
        mean: float32 or float64 tensor, usually of shape ``(C,)``: one entry a channel.
        m2: the sum of squared deviations from the mean; shape, dtype and device of ``mean``.

    Raises:
        DtypeError: if ``mean`` or ``m2`` is neither float32 nor float64.
        InputError: if the shapes do not fit.

    Example:
        >>> import torch
        >>> from normwise import Moments
        >>> a = Moments.of(torch.tensor([1.0, 2.0, 3.0]))
        >>> b = Moments.of(torch.tensor([10.0]))
        >>> both = a.merge(b)
        >>> int(both.count), float(both.mean), float(both.variance())
        (4, 4.0, 12.5)
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __post_init__(self) -> None:
        mean, m2 = self.mean, self.m2
        for name, t in (("mean", mean), ("m2", m2)):
            if t.dtype not in (torch.float32, torch.float64):
                raise DtypeError(
                    message(
                        "moments are kept in float32 or float64",
                        f"{name} of dtype {t.dtype}",
                        f"{name}.float()",
                    )
                )
        if mean.shape != m2.shape or mean.dtype != m2.dtype:
            raise InputError(
                message(
                    "mean and m2 have one shape and one dtype",
                    f"mean {tuple(mean.shape)} {mean.dtype}, m2 {tuple(m2.shape)} {m2.dtype}",
                    "build both from the same reduction",
                )
            )
        count = torch.as_tensor(self.count, device=mean.device)
        if count.is_floating_point() or count.dtype == torch.bool:
            count = count.round()
        count = count.to(torch.int64)
        try:
            # A number fits without asking: broadcast_shapes takes 30 us, as much as a merge.
            fits = not count.dim() or torch.broadcast_shapes(count.shape, mean.shape) == mean.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InputError(
                message(
                    "count broadcasts against mean",
                    f"count {tuple(count.shape)}, mean {tuple(mean.shape)}",
                    "one count for all channels (an int) or one for each",
                )
            )
        object.__setattr__(self, "count", count)

    # -- making ---------------------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        values: Tensor,
        dim: int | Sequence[int] | None = None,
        mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Moments:
        """Moments of ``values`` over ``dim`` (all axes if None), in two exact passes.

        Args:
            values: any floating tensor.
            dim: the axes that are averaged over (as in ``torch.mean``; the others are kept).
            mask: boolean, broadcastable to ``values``: True where an element counts.
            dtype: float32 or float64, the dtype inside; default float64 where the device has it.
        """
        if not values.is_floating_point():
            raise DtypeError(
                message("moments are taken of floating values", f"{values.dtype}", "values.float()")
            )
        v = values.to(dtype or accumulation_dtype(values))
        if dim is None:
            dims = list(range(v.dim()))
        else:
            dims = [_axis(d, v.dim()) for d in ([dim] if isinstance(dim, int) else dim)]
        if mask is None:
            n = 1
            for d in dims:
                n *= v.shape[d]
            total = v.sum(dims, keepdim=True) if dims else v
            mean = total / max(n, 1)
            deviation = v - mean
            count = torch.full((), n, dtype=torch.int64, device=v.device)
        else:
            # Not a product with the mask: 0 * nan is nan, and padding may hold anything.
            zero = v.new_zeros(())
            kept = mask.expand(v.shape)
            per_set = kept.sum(dims, keepdim=True) if dims else kept.to(torch.int64)
            kept_values = torch.where(kept, v, zero)
            total = kept_values.sum(dims, keepdim=True) if dims else kept_values
            mean = total / per_set.clamp(min=1)
            deviation = torch.where(kept, v - mean, zero)
            count = per_set.squeeze(dims) if dims else per_set
        square = deviation * deviation
        if dims:
            return cls(count, mean.squeeze(dims), square.sum(dims))
        return cls(count, mean, square)

    @classmethod
    def empty(
        cls,
        shape: Sequence[int] = (),
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> Moments:
        """Moments of nothing: the neutral element of ``merge``."""
        zeros = torch.zeros(tuple(shape), dtype=dtype, device=device)
        return cls(torch.zeros((), dtype=torch.int64, device=device), zeros, zeros.clone())

    # -- merging --------------------------------------------------------------------------------

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of two disjoint sets. Exact for any two counts, 0 included."""
        if self.mean.shape != other.mean.shape:
            raise InputError(
                message(
                    "moments that merge have one shape",
                    f"{tuple(self.mean.shape)} and {tuple(other.mean.shape)}",
                    "merge sets that were taken over the same channels",
                )
            )
        count = self.count + other.count
        dtype = torch.promote_types(self.mean.dtype, other.mean.dtype)
        n_a, n_b = self.count.to(dtype), other.count.to(dtype)
        n = count.to(dtype).clamp(min=1)
        a_mean, b_mean = self.mean.to(dtype), other.mean.to(dtype)
        delta = b_mean - a_mean
        mean = a_mean + delta * (n_b / n)
        m2 = self.m2 + other.m2 + delta * delta * (n_a * (n_b / n))
        # An empty side is neutral to the last bit, even where its mean is a placeholder.
        a_empty, b_empty = self.count == 0, other.count == 0
        mean = torch.where(a_empty, b_mean, torch.where(b_empty, a_mean, mean))
        m2 = torch.where(
            a_empty, other.m2.to(dtype), torch.where(b_empty, self.m2.to(dtype), m2.to(dtype))
        )
        return Moments(count, mean, m2)

    __add__ = merge

    def __radd__(self, other: object) -> Moments:
        """Lets the built-in ``sum(list_of_moments)`` work, which starts from 0."""
        if isinstance(other, int) and other == 0:
            return self
        return NotImplemented

    @classmethod
    def sum(cls, many: Iterable[Moments]) -> Moments:
        """Merge many sets, in the order given (fixed order, hence the same bits every time)."""
        iterator = iter(many)
        first = next(iterator, None)
        if first is None:
            raise InputError(
                message("a sum over moments has a first term", "no moments", "Moments.empty((C,))")
            )
        total = first
        for m in iterator:
            total = total.merge(m)
        return total

    def reduce(self, dim: int) -> Moments:
        """Merge the sets that lie along axis ``dim`` of one ``Moments`` (ranks, ghost batches)."""
        axis = _axis(dim, self.mean.dim())
        n_each = self.count.expand(self.mean.shape)
        count = n_each.sum(axis)
        dtype = self.mean.dtype
        weight = n_each.to(dtype)
        n = count.to(dtype).clamp(min=1)
        # Centre on the mean of the largest set: sums of means around 1e6 would round the spread
        # away, and an empty set's mean is a placeholder.
        largest = n_each.argmax(axis, keepdim=True) if self.mean.shape[axis] else None
        centre = (
            self.mean.sum(axis)
            if largest is None
            else self.mean.gather(axis, largest).squeeze(axis)
        )
        centre = torch.where(count == 0, centre.new_zeros(()), centre)
        offset = self.mean - centre.unsqueeze(axis)
        offset = torch.where(n_each == 0, offset.new_zeros(()), offset)
        shift = (offset * weight).sum(axis) / n
        spread = offset - shift.unsqueeze(axis)
        m2 = torch.where(n_each == 0, offset.new_zeros(()), self.m2 + spread * spread * weight)
        return Moments(count, centre + shift, m2.sum(axis))

    # -- reading --------------------------------------------------------------------------------

    def variance(self, correction: float = 0) -> Tensor:
        """``m2 / (count - correction)``: 0 gives the biased one that normalizes, 1 the unbiased
        one that torch.nn keeps in ``running_var``. NaN where ``count <= correction``, as in
        ``torch.var``."""
        n = (self.count.to(self.m2.dtype) - correction).clamp(min=0)
        return self.m2 / n

    def std(self, correction: float = 0) -> Tensor:
        """Square root of :meth:`variance`."""
        return self.variance(correction).sqrt()

    def rstd(self, eps: float = 1e-5) -> Tensor:
        """``1 / sqrt(variance + eps)`` with the biased variance: what batch norm multiplies by."""
        return (self.variance() + eps).rsqrt()

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Moments:
        """The same moments on another device or in the other dtype."""
        return Moments(
            self.count.to(device=device),
            self.mean.to(device=device, dtype=dtype),
            self.m2.to(device=device, dtype=dtype),
        )

    def __repr__(self) -> str:
        shape, dtype = tuple(self.mean.shape), str(self.mean.dtype).removeprefix("torch.")
        n = f"{int(self.count)}" if self.count.dim() == 0 else f"{tuple(self.count.shape)}"
        return f"Moments(count={n}, shape={shape}, dtype={dtype}, device={self.mean.device})"
