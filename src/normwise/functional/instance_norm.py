"""``instance_norm``: each channel of each sample by its own moments."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from normwise.errors import InputError, message
from normwise.functional.batch_norm import batch_norm
from normwise.functional.checks import check_batch_norm
from normwise.functional.set_checks import check_channels, check_common
from normwise.functional.sets import direct, normalize_sets

__all__ = ["instance_norm"]


@torch.no_grad()
def _update_running(
    running_mean: Tensor, running_var: Tensor, moments: Tensor, samples: int, momentum: float
) -> None:
    """As torch.nn: the plain average over the samples moves them, of means and of unbiased
    variances. A sample without a value (all masked) takes no part; without any nothing moves."""
    count, mean, m2 = moments.reshape(3, samples, -1).unbind(0)
    there = (count > 0).to(mean.dtype)
    n = there.sum(0)
    var = m2 / (count - 1).clamp(min=1)
    for running, batch in ((running_mean, mean), (running_var, var)):
        average = (batch * there).sum(0) / n.clamp(min=1)
        moved = (1 - momentum) * running.to(average.dtype) + momentum * average
        running.copy_(torch.where(n > 0, moved.to(running.dtype), running))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    channel_dim: int = 1,
) -> Tensor:
    r"""Instance normalization (Ulyanov et al. 2016), for sample :math:`n` and channel :math:`c`:

    .. math::
        y = \phi\Bigl(\frac{x - \mu_{nc}}{\sqrt{\sigma_{nc}^2 + \epsilon}}\,\gamma_c + \beta_c
        + r\Bigr)

    with :math:`\mu, \sigma^2` the mean and biased variance over the positions of one channel of one
    sample (``use_input_stats=True``), or the running statistics. Arguments up to ``eps`` are those
    of :func:`torch.nn.functional.instance_norm`.

    Args:
        input: shape ``(N, C, *)``, or with the channels on ``channel_dim``; float64, float32,
            bfloat16 or float16. By its own statistics the output is contiguous, as torch.nn's is.
        running_mean, running_var: shape ``(C,)`` or None. With ``use_input_stats`` they move in
            place by the average over the samples: ``running = (1 - momentum) * running
            + momentum * average``, of the means and of the unbiased variances.
        weight, bias: :math:`\gamma, \beta`, shape ``(C,)`` or None, each alone if need be.
        use_input_stats: normalize by the input (True) or by the running statistics (False).
        momentum: the weight of the new samples.
        eps: :math:`\epsilon > 0`.
        residual: :math:`r`, the shape of ``input``, added before the activation.
        mask: boolean, rank of ``input``, size 1 on the channel axis and broadcastable over the
            others; False elements stay out of the statistics and come out as 0.
        activation: :math:`\phi`, a name as in :func:`batch_norm`, or None.
        channel_dim: the axis of the channels, -1 for channel-last data; not 0, the batch's.

    Raises:
        InputError: shape, size or option (a ValueError and a RuntimeError).
        DtypeError: an input that is not floating, a mask that is not boolean.

    Example:
        >>> import torch, normwise as nw
        >>> x = torch.tensor([[[1.0, 3.0]], [[100.0, 300.0]]])
        >>> nw.functional.instance_norm(x)
        tensor([[[-1.0000,  1.0000]],
        <BLANKLINE>
                [[-1.0000,  1.0000]]])
    """
    by_sample = use_input_stats and running_mean is None and running_var is None and mask is None
    if by_sample and channel_dim == 1 and eps > 0 and input.dim() > 2:
        batch, channels = input.shape[:2]
        if input.numel() > batch * channels:  # one value a channel is an error
            found = direct(input, channels, weight, bias, residual, eps, activation)
            if found is not None:
                return found
    act = check_common("instance norm", input, residual, eps, activation)
    axis = check_channels("instance norm", input, channel_dim)
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise InputError(
                message(
                    "Expected running_mean and running_var to be defined when use_input_stats is "
                    "false",
                    "one of them None",
                    "use_input_stats=True to normalize by the input",
                )
            )
        return batch_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps,
            residual=residual, mask=mask, activation=activation, channel_dim=axis,
        )  # fmt: skip
    check_batch_norm(
        input, running_mean, running_var, weight, bias, residual, mask, axis, True, eps
    )
    moved = axis != 1
    x = input.movedim(axis, 1) if moved else input
    length = prod(x.shape[2:])
    if length == 1:
        raise InputError(
            message(
                "Expected more than 1 spatial element when training",
                f"input size {tuple(input.shape)}",
                "a longer input: the one value of a channel is its own mean",
            )
        )
    view = (x.shape[0], x.shape[1], 1, length)
    if residual is not None and moved:
        residual = residual.movedim(axis, 1)
    if mask is not None:
        along = mask.movedim(axis, 1) if moved else mask
        mask = along.expand(x.shape[0], 1, *x.shape[2:]).reshape(x.shape[0], 1, 1, length)
    tracked = running_mean is not None and running_var is not None and input.numel() > 0
    y, moments = normalize_sets(
        x, view, weight, bias, residual, mask, eps, act, moments_too=tracked
    )
    if tracked and running_mean is not None and running_var is not None and moments is not None:
        _update_running(running_mean, running_var, moments, x.shape[0], momentum)
    return y.movedim(1, axis) if moved else y
