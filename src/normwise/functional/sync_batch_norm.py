"""``sync_batch_norm``: batch norm of the batch that all ranks of a process group hold together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise.activations import parse
from normwise.errors import InputError, message
from normwise.functional.autograd import transformed
from normwise.functional.by_moments import (
    merge_over,
    move_running,
    normalize_by_moments,
    packed_moments,
)
from normwise.functional.checks import check_batch_norm, check_policy
from normwise.functional.collectives import Who

__all__ = ["sync_batch_norm"]


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    group: Any,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    channel_dim: int = 1,
    num_batches_tracked: Tensor | None = None,
    nonfinite: str = "propagate",
    nonfinite_batches: Tensor | None = None,
    who: Who = None,
) -> Tensor:
    r"""Training batch norm by the moments of all ranks' batches, merged exactly.

    Each rank takes the moments of its own batch (which may be empty), gathers the others'
    (2C + 1 float64 numbers each: mean, m2 and a count) and merges them (Chan, Golub & LeVeque
    1979); the backward adds up 2C numbers a rank. ``group`` is a
    process group of two ranks or more; every rank of it must make the call. Other arguments and
    errors as in :func:`~normwise.functional.batch_norm`.

    Raises:
        CollectiveError: if a collective fails or times out; ``who()`` names the layer.
        InputError: under ``torch.func`` and forward mode, which collectives do not go through.
    """
    axis = check_batch_norm(
        input, running_mean, running_var, weight, bias, residual, mask, channel_dim, True, eps
    )
    act = "none" if activation is None else activation
    parse(act)
    check_policy(nonfinite, momentum, running_mean, num_batches_tracked)
    if not torch.compiler.is_compiling() and transformed():
        raise InputError(
            message(
                "a collective has no derivative under torch.func, forward mode or a trace",
                "a call of a synchronised norm inside such a transform",
                "torch.autograd (create_graph=True for second derivatives), or eval mode",
            )
        )
    moments = merge_over(packed_moments(input, mask, axis), group, who)
    y = normalize_by_moments(
        input, weight, bias, residual, mask, moments, axis, eps, act, group, who
    )
    move_running(
        running_mean, running_var, num_batches_tracked, nonfinite_batches, moments, momentum,
        nonfinite,
    )  # fmt: skip
    return y
