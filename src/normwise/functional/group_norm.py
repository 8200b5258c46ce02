"""``group_norm``: each group of a sample's channels by its own moments."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from normwise.errors import InputError, message
from normwise.functional.set_checks import check_channels, check_common, check_vector
from normwise.functional.sets import direct, normalize_sets

__all__ = ["group_norm"]


def _in_memory_format_of(x: Tensor, y: Tensor) -> Tensor:
    """channels_last stays channels_last, as in torch.nn."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    format = formats.get(x.dim())
    if format is None or x.is_contiguous() or not x.is_contiguous(memory_format=format):
        return y
    return y.contiguous(memory_format=format)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    channel_dim: int = 1,
) -> Tensor:
    r"""Group normalization (Wu & He 2018, eq. 1 to 4), for sample :math:`n` and group :math:`g`:

    .. math::
        y = \phi\Bigl(\frac{x - \mu_{ng}}{\sqrt{\sigma_{ng}^2 + \epsilon}}\,\gamma_c + \beta_c
        + r\Bigr)

    with :math:`\mu, \sigma^2` the mean and biased variance over a group of
    ``C / num_groups`` neighbouring channels and all positions. Arguments up to ``eps`` are those of
    :func:`torch.nn.functional.group_norm`.

    Args:
        input: shape ``(N, C, *)``, or with the channels on ``channel_dim``; float64, float32,
            bfloat16 or float16. The output has its shape and dtype; channels_last stays so.
        num_groups: a divisor of ``C``: 1 averages over all of a sample, ``C`` is instance norm.
        weight, bias: :math:`\gamma, \beta`, shape ``(C,)`` or None, each alone if need be.
        eps: :math:`\epsilon \ge 0`.
        residual: :math:`r`, the shape of ``input``, added before the activation.
        activation: :math:`\phi`, a name as in :func:`batch_norm`, or None.
        channel_dim: the axis of the channels, -1 for channel-last data; not 0, the batch's.

    Raises:
        InputError: shape, size or option (a ValueError and a RuntimeError).
        DtypeError: an input that is not floating.

    Example:
        >>> import torch, normwise as nw
        >>> x = torch.tensor([[1.0, 3.0, 10.0, 30.0]])
        >>> nw.functional.group_norm(x, 2, eps=0.0)
        tensor([[-1.,  1., -1.,  1.]])
    """
    if channel_dim == 1:
        found = direct(input, num_groups, weight, bias, residual, eps, activation)
        if found is not None:
            return found
    act = check_common("group norm", input, residual, eps, activation)
    axis = check_channels("group norm", input, channel_dim)
    channels = input.shape[axis]
    if num_groups < 1 or channels % num_groups:
        raise InputError(
            message(
                "Expected number of channels in input to be divisible by num_groups",
                f"input of shape {list(input.shape)}, {channels} channels and "
                f"num_groups={num_groups}",
                "a divisor of the number of channels",
            )
        )
    for name, v in (("weight", weight), ("bias", bias)):
        check_vector(name, v, (channels,), "a vector of size equal to the number of channels")
    x = input if axis == 1 else input.movedim(axis, 1)
    length = prod(x.shape[2:])
    if x.shape[0] * (channels // num_groups) * length == 1:
        raise InputError(
            message(
                "Expected more than 1 value per channel when training",
                f"input size {list(input.shape)} with num_groups={num_groups}",
                "fewer groups: the one value of a group is its own mean",
            )
        )
    view = (x.shape[0], num_groups, channels // num_groups, length)
    if residual is not None and axis != 1:
        residual = residual.movedim(axis, 1)
    y, _ = normalize_sets(x, view, weight, bias, residual, None, eps, act)
    return _in_memory_format_of(input, y) if axis == 1 else y.movedim(1, axis)
