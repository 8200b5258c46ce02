"""``layer_norm`` and ``rms_norm``: each row of features by its own moments."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from normwise.functional.set_checks import check_common, check_vector, normalized_axes
from normwise.functional.sets import direct, normalize_sets

__all__ = ["layer_norm", "rms_norm"]

_EPS = torch.finfo(torch.float32).eps
_EPS_DOUBLE = torch.finfo(torch.float64).eps


def _by_rows(
    name: str,
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    centred: bool,
) -> Tensor:
    spec = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    found = direct(x, spec, weight, bias, residual, eps, activation, centred)
    if found is not None:
        return found
    act = check_common(name, x, residual, eps, activation)
    shape = normalized_axes(x, normalized_shape)
    check_vector("weight", weight, shape, "of same shape as normalized_shape")
    check_vector("bias", bias, shape, "of same shape as normalized_shape")
    # Counted, not -1: an empty tensor's rows could not be told.
    view = (prod(x.shape[: x.dim() - len(shape)]), 1, prod(shape), 1)
    y, _ = normalize_sets(x, view, weight, bias, residual, None, eps, act, centred)
    return y


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    r"""Layer normalization (Ba, Kiros & Hinton 2016, eq. 3 and 4), for each row :math:`i`:

    .. math::
        y = \phi\Bigl(\frac{x - \mu_i}{\sqrt{\sigma_i^2 + \epsilon}} \odot \gamma + \beta
        + r\Bigr)

    with :math:`\mu_i, \sigma_i^2` the mean and biased variance over the last axes, those of
    ``normalized_shape``. Arguments up to ``eps`` are those of
    :func:`torch.nn.functional.layer_norm`.

    Args:
        input: shape ``(*, *normalized_shape)``; float64, float32, bfloat16 or float16. The output
            has its shape and dtype and is contiguous, as torch.nn's is.
        normalized_shape: the sizes of the last axes, an int for one.
        weight, bias: :math:`\gamma, \beta`, shape ``normalized_shape`` or None, each alone if need
            be, in a dtype of their own if need be.
        eps: :math:`\epsilon \ge 0`.
        residual: :math:`r`, the shape of ``input``, added before the activation.
        activation: :math:`\phi`, a name as in :func:`batch_norm`, or None.

    Raises:
        InputError: shape, size or option (a ValueError and a RuntimeError).
        DtypeError: an input that is not floating.

    Example:
        >>> import torch, normwise as nw
        >>> x = torch.tensor([[1.0, 2.0, 3.0], [1e6, 1e6 + 1, 1e6 + 2]])
        >>> nw.functional.layer_norm(x, 3, eps=0.0)
        tensor([[-1.2247,  0.0000,  1.2247],
                [-1.2247,  0.0000,  1.2247]])
    """
    return _by_rows(
        "layer norm", input, normalized_shape, weight, bias, eps, residual, activation, True
    )


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    r"""Root mean square normalization (Zhang & Sennrich 2019, eq. 4), for each row :math:`i`:

    .. math::
        y = \phi\Bigl(\frac{x}{\sqrt{\frac1D\sum_j x_{ij}^2 + \epsilon}} \odot \gamma + r\Bigr)

    Arguments up to ``eps`` are those of :func:`torch.nn.functional.rms_norm`; the others, shapes
    and errors are those of :func:`layer_norm`. ``eps`` None is the machine epsilon of what is
    computed with: that of float64 for float64, of float32 for all others.

    Example:
        >>> import torch, normwise as nw
        >>> y = nw.functional.rms_norm(torch.tensor([[3.0, 4.0]]), 2)
        >>> round(y.square().mean().item(), 5)
        1.0
    """
    if eps is None:
        eps = _EPS_DOUBLE if input.dtype == torch.float64 else _EPS
    return _by_rows(
        "RMS norm", input, normalized_shape, weight, None, eps, residual, activation, False
    )
