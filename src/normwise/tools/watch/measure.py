"""The figures of one call of a norm: taken on the device, brought over together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normwise.functional import batch_moments
from normwise.functional.masks import lengths_to_mask
from normwise.moments import accumulation_dtype
from normwise.nn.modes import current
from normwise.nn.switches import Switches
from normwise.tools.norms import boolean_mask, drift, largest

__all__ = ["GAPS", "bring", "count_nonfinite", "gaps", "mask_of", "norm", "percentiles", "spread"]

GAPS = ("shift", "shift_median", "log_var", "log_var_median")
"""What :func:`gaps` gives, in order."""


@lru_cache(maxsize=1024)
def _step(n: int, most: int) -> int:
    """Every how manyeth of n values to take, for at most so many. Without a common divisor with n,
    hence with the size of any axis: else every 64th value of 64 channels would be one channel's."""
    step = -(-n // most)
    while gcd(step, n) > 1:
        step += 1
    return step


def _flat(x: Tensor) -> Tensor | None:
    """The values in the order in which they lie in memory, a view; None if there are gaps."""
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=lambda d: (x.stride(d), x.shape[d]), reverse=True))
        if not x.is_contiguous():
            return None
    return x.view(-1)


def spread(x: Tensor, most: int, mask: Tensor | None = None) -> Tensor:
    """At most ``most`` values of x, evenly spread, as a copy in float32 or float64, (n,).

    No random numbers: training draws its own from the same generator.
    """
    x = x.detach()
    n = x.numel()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    step = _step(n, most) if n > most else 1
    flat = _flat(x) if mask is None else None
    if flat is not None:
        return flat[::step].to(dtype, copy=True)
    if n == 0:
        return torch.empty(0, dtype=dtype, device=x.device)
    index = torch.unravel_index(torch.arange(0, n, step, device=x.device), x.shape)
    values = x[index].to(dtype)
    return values if mask is None else values[mask.expand(x.shape)[index]]


def mask_of(module: nn.Module, x: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Which values count, by the call's ``mask=`` or ``lengths=``."""
    lengths = given.get("lengths")
    if lengths is None:
        return boolean_mask(given.get("mask"))
    return lengths_to_mask(lengths, x, getattr(module, "channel_dim", 1))


def count_nonfinite(x: Tensor, mask: Tensor | None) -> Tensor:
    """How many of the values are inf or NaN, an int64 scalar on x's device."""
    if x.is_cpu and mask is None:
        # One pass that writes nothing: 0.05 ms for 524,288 float32, isfinite 1.4 ms. A sum that
        # overflows of finite values only means that they are counted.
        total = x.sum(dtype=torch.promote_types(x.dtype, torch.float32))
        if bool(torch.isfinite(total)):
            return torch.zeros((), dtype=torch.int64)
    bad = ~torch.isfinite(x)
    count: Tensor = (bad if mask is None else bad & mask).sum()
    return count


def _remembered(module: nn.Module) -> tuple[Any, Any]:
    """Running mean and variance that are in force (those of the domain, where there is one)."""
    if isinstance(module, Switches):
        mean, var, _ = module._statistics(current().domain)
        return mean, var
    return getattr(module, "running_mean", None), getattr(module, "running_var", None)


def gaps(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor | None:
    """:data:`GAPS` of the remembered statistics against x, (4,); None where nothing is remembered
    or x does not fit. To be called before the norm moves them."""
    mean, var = _remembered(module)
    axis = getattr(module, "channel_dim", 1)
    if not (isinstance(mean, Tensor) and isinstance(var, Tensor)) or not x.numel():
        return None
    x = x.detach()
    if isinstance(module, _InstanceNorm):
        if mask is not None:
            return None
        # Remembered are the means over the samples of each sample's mean and unbiased variance.
        if x.dim() == module._get_no_batch_dim():
            x = x.unsqueeze(0)
        if x.shape[axis] != mean.numel():
            return None
        sets = x.movedim(axis, 1).reshape(x.shape[0] * mean.numel(), -1)
        seen = batch_moments(sets, 0)
        seen_mean, seen_var = (
            t.reshape(-1, mean.numel()).mean(0) for t in (seen.mean, seen.variance(1))
        )
    else:
        if x.dim() < 2 or x.shape[axis] != mean.numel():
            return None
        seen = batch_moments(x, axis, mask)
        seen_mean, seen_var = seen.mean, seen.variance(1)
    eps = float(getattr(module, "eps", 0.0))
    shift, log_var = drift(mean.to(seen_mean), var.to(seen_var), seen_mean, seen_var, eps)
    return torch.stack([shift.max(), shift.median(), largest(log_var), log_var.abs().median()])


def norm(gradient: Tensor) -> Tensor:
    """The 2-norm, in float64 where the device has it: squares of 1e20 overflow in float32."""
    gradient = gradient.detach()
    size: Tensor = torch.linalg.vector_norm(gradient, dtype=accumulation_dtype(gradient))
    return size


def bring(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """All of them as flat arrays, with one copy for each device and dtype: one wait for a GPU."""
    groups: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.device, t.dtype), []).append(i)
    found: list[Any] = [None] * len(tensors)
    for members in groups.values():
        whole = torch.cat([tensors[i].reshape(-1) for i in members]).cpu().numpy()
        end = 0
        for i in members:
            start, end = end, end + tensors[i].numel()
            found[i] = whole[start:end]
    return found


def percentiles(
    samples: Sequence[NDArray[Any]], at: NDArray[np.float64]
) -> list[list[float] | None]:
    """Of each sample those of its finite values, linear between neighbours; None without any.

    numpy.percentile is the same and takes 100 us a sample; samples of one size are sorted together
    here, as those of a network mostly are.
    """
    groups: dict[int, list[int]] = {}
    found: list[list[float] | None] = [None] * len(samples)
    finite = [v if np.isfinite(v).all() else v[np.isfinite(v)] for v in samples]
    for i, v in enumerate(finite):
        groups.setdefault(v.size, []).append(i)
    for size, members in groups.items():
        if not size:
            continue
        values = np.stack([finite[i] for i in members])
        values.sort(axis=1)
        position = at / 100 * (size - 1)
        below = position.astype(np.int64)
        low = values[:, below].astype(np.float64)
        high = values[:, np.minimum(below + 1, size - 1)].astype(np.float64)
        part = position - below
        curves: list[list[float]] = (low * (1 - part) + high * part).tolist()
        for i, curve in zip(members, curves, strict=True):
            found[i] = curve
    return found
