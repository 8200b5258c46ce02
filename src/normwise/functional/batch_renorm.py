"""``batch_renorm``: batch norm, corrected towards the running statistics (Ioffe 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.activations import parse
from normwise.functional.autograd import transformed
from normwise.functional.by_moments import move_running, normalize_by_moments, packed_moments
from normwise.functional.checks import check_batch_norm, check_enough_values, check_policy
from normwise.ops import reference

__all__ = ["batch_renorm", "corrections"]


def corrections(
    moments: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    rmax: Tensor | float,
    dmax: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """r and d of each channel, without a gradient; 1 and 0 for a batch without elements."""
    count, mean, m2 = moments.detach().unbind(0)
    sigma_batch = (m2 / count.clamp(min=1) + eps).sqrt()
    sigma = (running_var.detach().to(mean.dtype) + eps).sqrt()
    limit = torch.as_tensor(rmax, dtype=mean.dtype, device=mean.device)
    shift = torch.as_tensor(dmax, dtype=mean.dtype, device=mean.device)
    r = torch.clamp(sigma_batch / sigma, 1 / limit, limit)
    d = torch.clamp((mean - running_mean.detach().to(mean.dtype)) / sigma, -shift, shift)
    some = count > 0
    return torch.where(some, r, torch.ones_like(r)), torch.where(some, d, torch.zeros_like(d))


def batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    rmax: Tensor | float = 3.0,
    dmax: Tensor | float = 5.0,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    channel_dim: int = 1,
    num_batches_tracked: Tensor | None = None,
    nonfinite: str = "propagate",
    nonfinite_batches: Tensor | None = None,
) -> Tensor:
    r"""Training batch renorm (Ioffe 2017, algorithm 1): :math:`\hat x` is corrected by constants,

    .. math::
        \hat x = \frac{x - \mu_B}{\sigma_B}\,r + d,\quad
        r = \mathrm{clip}_{[1/r_{max},\,r_{max}]}\frac{\sigma_B}{\sigma},\quad
        d = \mathrm{clip}_{[-d_{max},\,d_{max}]}\frac{\mu_B - \mu}{\sigma}

    with the running :math:`\mu, \sigma` as they were before this batch. Between the limits
    :math:`\hat x` is what eval mode makes of x. Other arguments and errors as in
    :func:`~normwise.functional.batch_norm`.
    """
    axis = check_batch_norm(
        input, running_mean, running_var, weight, bias, residual, mask, channel_dim, True, eps
    )
    act = "none" if activation is None else activation
    parse(act)
    if mask is None:
        check_enough_values(input, axis)
    check_policy(nonfinite, momentum, running_mean, num_batches_tracked)
    pure = not torch.compiler.is_compiling() and transformed()
    moments = reference.moments(input, mask, axis) if pure else packed_moments(input, mask, axis)
    r, d = corrections(moments, running_mean, running_var, eps, rmax, dmax)
    # gamma * (xhat * r + d) + beta: a batch norm with other parameters.
    scale = r if weight is None else weight * r
    offset = d if weight is None else weight * d
    if bias is not None:
        offset = offset + bias
    rest = (residual, mask)
    if pure:
        y = reference.train_forward(input, scale, offset, *rest, axis, eps, act)[0]
    else:
        y = normalize_by_moments(input, scale, offset, *rest, moments, axis, eps, act)
    move_running(
        running_mean, running_var, num_batches_tracked, nonfinite_batches, moments, momentum,
        nonfinite,
    )  # fmt: skip
    return y
