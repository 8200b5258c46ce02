"""The operators: names, schemas and shapes. Nothing here computes; backends implement these.

All per-channel results are in ``accumulation_dtype(x)`` (float64 where the device has it). A
``moments`` tensor has shape ``(3, C)``: the rows are count, mean and m2 (see ``Moments``).

``mask`` is boolean and broadcasts over all but the channel axis; False elements take no part in
any sum, come out as 0 and receive no gradient. ``activation`` is a name of
``normwise.activations``; ``output`` is y itself, given where it can replace ``residual``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.moments import accumulation_dtype

__all__ = ["LIBRARY", "NAMESPACE"]

NAMESPACE = "normwise"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# x -> moments of x over all axes but channel_dim
LIBRARY.define("moments(Tensor x, Tensor? mask, int channel_dim) -> Tensor")

# y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)
LIBRARY.define(
    "normalize(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual,"
    " Tensor? mask, int channel_dim, float eps, str activation) -> Tensor"
)

# moments and normalize in one call that may read x from memory once
LIBRARY.define(
    "train_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask,"
    " int channel_dim, float eps, str activation) -> (Tensor y, Tensor moments)"
)

# the policy that consumes moments: exponential (momentum a number) or cumulative (None)
LIBRARY.define(
    "update_running(Tensor(a!) running_mean, Tensor(b!) running_var,"
    " Tensor(c!)? num_batches_tracked, Tensor(d!)? nonfinite_batches, Tensor moments,"
    " float? momentum, str nonfinite) -> ()"
)

# with dz = dy * activation'(z): row 0 is sum(dz), row 1 is sum(dz * (x - mean)); shape (2, C)
LIBRARY.define(
    "backward_reduce(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias,"
    " Tensor? residual, Tensor? output, Tensor? mask, int channel_dim, float eps,"
    " str activation) -> Tensor"
)

# dx = weight * rstd * (dz - sums[0] / n - (x - mean) * rstd**2 * sums[1] / n), n = count;
# without sums (statistics that are constants, as in eval) dx = weight * rstd * dz.
# The second result is dz, the residual's gradient, or empty if it is not asked for.
LIBRARY.define(
    "backward_input(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias,"
    " Tensor? residual, Tensor? output, Tensor? mask, Tensor? sums, Tensor? count,"
    " int channel_dim, float eps, str activation, bool residual_gradient) -> (Tensor, Tensor)"
)

# backward_reduce and backward_input in one call: (dx, dresidual, dweight, dbias), the last two in
# their parameter's dtype and empty without the parameter
LIBRARY.define(
    "train_backward(Tensor dy, Tensor x, Tensor moments, Tensor? weight, Tensor? bias,"
    " Tensor? residual, Tensor? output, Tensor? mask, int channel_dim, float eps,"
    " str activation, bool residual_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)

# the same with statistics that are constants, as in eval mode
LIBRARY.define(
    "eval_backward(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias,"
    " Tensor? residual, Tensor? output, Tensor? mask, int channel_dim, float eps,"
    " str activation, bool residual_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)

# Layer, RMS, group and instance norm: x contiguous, of any shape, is (N, G, P, L) = view; each of
# the N * G sets of P * L values is normalized by its own moments (about 0 and divided by the root
# mean square where not `centred`); weight and bias hold G * P values, each for a run of L.
# moments: (3, N * G).
LIBRARY.define(
    "sets_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, SymInt[] view,"
    " float eps, str activation, bool centred) -> (Tensor y, Tensor moments)"
)

# (dx, dresidual, dweight, dbias), empty where not asked for or without the parameter; without
# moments they are taken once more from x
LIBRARY.define(
    "sets_backward(Tensor dy, Tensor x, Tensor? moments, Tensor? weight, Tensor? bias,"
    " Tensor? residual, Tensor? output, SymInt[] view, float eps, str activation, bool centred,"
    " bool residual_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _per_channel(x: Tensor, rows: int, channel_dim: int) -> Tensor:
    return x.new_empty((rows, x.shape[channel_dim]), dtype=accumulation_dtype(x))


@torch.library.register_fake("normwise::moments", lib=LIBRARY)
def _(x: Tensor, mask: Tensor | None, channel_dim: int) -> Tensor:
    return _per_channel(x, 3, channel_dim)


@torch.library.register_fake("normwise::normalize", lib=LIBRARY)
def _(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("normwise::train_forward", lib=LIBRARY)
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _per_channel(x, 3, channel_dim)


@torch.library.register_fake("normwise::update_running", lib=LIBRARY)
def _(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    nonfinite_batches: Tensor | None,
    moments: Tensor,
    momentum: float | None,
    nonfinite: str,
) -> None:
    return None


@torch.library.register_fake("normwise::backward_reduce", lib=LIBRARY)
def _(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
) -> Tensor:
    return _per_channel(x, 2, channel_dim)


def _residual_gradient(x: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(x) if wanted else x.new_empty((0,))


def _parameter_gradient(x: Tensor, parameter: Tensor | None) -> Tensor:
    return x.new_empty((0,)) if parameter is None else torch.empty_like(parameter)


@torch.library.register_fake("normwise::backward_input", lib=LIBRARY)
def _(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    sums: Tensor | None,
    count: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
    residual_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _residual_gradient(x, residual_gradient)


@torch.library.register_fake("normwise::train_backward", lib=LIBRARY)
def _(
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
    residual_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x),
        _residual_gradient(x, residual_gradient),
        _parameter_gradient(x, weight),
        _parameter_gradient(x, bias),
    )


@torch.library.register_fake("normwise::eval_backward", lib=LIBRARY)
def _(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
    eps: float,
    activation: str,
    residual_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x),
        _residual_gradient(x, residual_gradient),
        _parameter_gradient(x, weight),
        _parameter_gradient(x, bias),
    )


@torch.library.register_fake("normwise::sets_forward", lib=LIBRARY)
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    view: list[int],
    eps: float,
    activation: str,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((3, view[0] * view[1]), dtype=accumulation_dtype(x))


@torch.library.register_fake("normwise::sets_backward", lib=LIBRARY)
def _(
    dy: Tensor,
    x: Tensor,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    view: list[int],
    eps: float,
    activation: str,
    centred: bool,
    residual_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if residual_gradient else (0,)),
        _parameter_gradient(x, weight),
        _parameter_gradient(x, bias),
    )
