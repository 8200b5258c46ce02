"""Masks from the lengths of padded sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normwise.errors import DtypeError, InputError, message
from normwise.functional.autograd import transformed

__all__ = ["lengths_to_mask"]


def lengths_to_mask(
    lengths: Tensor | Sequence[int], x: Tensor, channel_dim: int, mask: Tensor | None = None
) -> Tensor:
    """True where an element of a padded sequence counts: position < length.

    Args:
        lengths: integers, shape ``(N,)``, each from 0 to L.
        x: ``(N, C, L)`` with ``channel_dim=1``, or ``(N, L, C)`` with ``channel_dim=-1``.
        channel_dim: the axis of the channels.
        mask: must be None: lengths and a mask say the same thing.

    Returns:
        ``(N, 1, L)`` or ``(N, L, 1)``, boolean.

    Raises:
        InputError: wrong rank or shape, a length below 0 or beyond L (on a GPU and in compiled code
            an assertion on the device: nothing waits for it), lengths and mask both.
        DtypeError: lengths that are not integers.

    Example:
        >>> import torch
        >>> lengths_to_mask(torch.tensor([2, 0]), torch.zeros(2, 5, 3), 1).int().squeeze(1).tolist()
        [[1, 1, 0], [0, 0, 0]]
    """
    if mask is not None:
        raise InputError(
            message(
                "mask= and lengths= say the same thing in two ways",
                "both of them",
                "one of them; for both conditions mask & a mask of the lengths",
            )
        )
    axis = channel_dim + x.dim() if channel_dim < 0 else channel_dim
    if x.dim() != 3 or axis not in (1, 2):
        raise InputError(
            message(
                "lengths= are those of padded sequences, (N, C, L) or (N, L, C)",
                f"an input of shape {tuple(x.shape)} with channel axis {channel_dim}",
                "mask= for any other input",
            )
        )
    given = torch.as_tensor(lengths, device=x.device)
    if given.dtype == torch.bool or given.is_floating_point() or given.is_complex():
        raise DtypeError(
            message("lengths are integers", f"dtype {given.dtype}", "lengths.long(), or mask=")
        )
    batch, positions = x.shape[0], x.shape[3 - axis]
    if given.shape != (batch,):
        raise InputError(
            message(
                f"there is one length for each sequence, shape ({batch},)",
                f"lengths of shape {tuple(given.shape)} for an input of shape {tuple(x.shape)}",
                f"lengths[:{batch}], or mask=",
            )
        )
    _check_values(given, positions)
    kept = torch.arange(positions, device=x.device) < given.unsqueeze(1)
    return kept.unsqueeze(axis)


def _check_values(lengths: Tensor, positions: int) -> None:
    if torch.compiler.is_compiling() or not lengths.is_cpu:
        fits = ((lengths >= 0) & (lengths <= positions)).all()
        torch._assert_async(fits, f"lengths are from 0 to {positions}")
        return
    if transformed() or not lengths.numel():
        return  # under vmap values cannot be looked at; comparing them gives a mask all the same
    low, high = (int(v) for v in lengths.aminmax())
    if low < 0 or high > positions:
        raise InputError(
            message(
                f"lengths are from 0 to {positions}, the size of the sequence axis",
                f"lengths from {low} to {high}",
                "lengths counted after padding, striding and cropping",
            )
        )
