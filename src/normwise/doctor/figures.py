"""Small computations that several rules share."""

from __future__ import annotations

from torch import Tensor

from normwise.doctor.subject import NormState

__all__ = ["DEFAULT_EPS", "DEFAULT_MOMENTUM", "dead", "eps_of", "first", "median", "nonzero_median"]

# torch.nn's, for checkpoints, which hold tensors only.
DEFAULT_EPS = 1e-5
DEFAULT_MOMENTUM = 0.1

# A channel whose variance is under ten times eps: eps then makes up a tenth of what is under the
# root or more, so its output's deviation is off by 5 % and more.
_DEAD = 10.0


def eps_of(norm: NormState) -> float:
    """The norm's eps; torch.nn's default where a checkpoint does not say."""
    return DEFAULT_EPS if norm.eps is None else norm.eps


def dead(norm: NormState) -> Tensor:
    """(C,) bool: whose running variance is within 10 eps of zero."""
    assert norm.var is not None
    return (norm.var >= 0) & (norm.var <= _DEAD * eps_of(norm))


def first(which: Tensor, limit: int = 8) -> list[int]:
    """The first few channels of a mask, for the evidence."""
    return [int(i) for i in which.nonzero().flatten()[:limit]]


def median(values: Tensor) -> float:
    """The middle one (the lower of two); 0 if there are none."""
    return float(values.median()) if values.numel() else 0.0


def nonzero_median(values: Tensor) -> float:
    """Of the finite values that are not 0; 0 if there are none."""
    return median(values[(values != 0) & values.isfinite()])
