"""Batch norm layers: torch.nn's constructors, attributes, state and semantics, our kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from normwise import functional as F
from normwise.activations import parse
from normwise.errors import InputError, NonFiniteError, message
from normwise.functional.checks import NONFINITE
from normwise.functional.masks import lengths_to_mask
from normwise.nn.modes import ACTIVE
from normwise.nn.naming import describe
from normwise.nn.switches import Switches

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class _FusedBatchNorm(Switches, _BatchNorm):
    """What the batch norm layers share. ``ranks`` are the input ranks the class takes, None any."""

    ranks: ClassVar[tuple[int, ...] | None] = None
    # What computes; the variants of batch norm have methods of their own, with these arguments.
    _batch_norm: Any = staticmethod(F.batch_norm)
    activation: str | None
    channel_dim: int
    nonfinite: str

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        channel_dim: int = 1,
        nonfinite: str = "propagate",
        normalize_with: str | None = None,
        update_stats: bool | None = None,
        domains: Sequence[str] = (),
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:  # torch.nn's own keyword came with 2.13; normwise runs on 2.10 and later
            self.register_parameter("bias", None)
        self._set_options(activation, channel_dim, nonfinite)
        self.normalize_with, self.update_stats = normalize_with, update_stats
        if domains:
            self.add_domains(*domains)

    def _set_options(self, activation: str | None, channel_dim: int, nonfinite: str) -> None:
        if activation is not None:
            parse(activation)
        if nonfinite not in NONFINITE:
            raise InputError(
                message("nonfinite names a policy", repr(nonfinite), f"one of {NONFINITE}")
            )
        self.activation = None if activation == "none" else activation
        self.channel_dim = channel_dim
        self.nonfinite = nonfinite
        # Not in the state dict, which stays that of torch.nn.
        counter = None
        if nonfinite == "skip" and self.num_batches_tracked is not None:
            counter = torch.zeros_like(self.num_batches_tracked)
        self.register_buffer("num_nonfinite_batches", counter, persistent=False)

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        counter = self._buffers.get("num_nonfinite_batches")
        if counter is not None:
            counter.zero_()

    def _check_input_dim(self, input: Tensor) -> None:
        ranks = self.ranks
        if ranks is None or input.dim() in ranks:
            return
        wanted = " or ".join(f"{r}D" for r in ranks)
        raise InputError(
            message(
                f"expected {wanted} input for {type(self).__name__}",
                f"{input.dim()}D input of shape {tuple(input.shape)}",
                "x.unsqueeze(0) for a single sample, or normwise.nn.BatchNorm for any rank",
            )
        )

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """``activation(bn(input) + residual)``; ``mask`` is True where an element counts, or
        ``lengths`` are those of padded sequences; ``activation`` is for this call instead of the
        layer's own."""
        if self.ranks is not None and input.dim() not in self.ranks:
            self._check_input_dim(input)
        if lengths is not None:
            mask = lengths_to_mask(lengths, input, self.channel_dim, mask)
        if activation is None:
            activation = self.activation
        if ACTIVE or self._switched:
            try:
                return self._by_switches(input, residual, mask, activation)
            except NonFiniteError as error:
                raise NonFiniteError(f"{describe(self)}: {error}") from None
        # Straight from the dicts: nn.Module.__getattr__ takes 0.4 us a name, as much in all as the
        # kernel on a small batch. What stands elsewhere (parametrized, pruned) comes the long way.
        parameters, buffers = self._parameters, self._buffers
        weight = parameters["weight"] if "weight" in parameters else self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias
        try:
            running_mean, running_var = buffers["running_mean"], buffers["running_var"]
            num_batches_tracked = buffers["num_batches_tracked"]
        except KeyError:
            running_mean, running_var = self.running_mean, self.running_var
            num_batches_tracked = self.num_batches_tracked
        training = self.training
        tracked = momentum = None
        if training:
            if self.track_running_stats:
                momentum, tracked = self.momentum, num_batches_tracked
                if momentum is None and tracked is None:
                    momentum = 0.0  # as in torch.nn: a cumulative average without its counter
            else:
                running_mean = running_var = None
        else:
            # Without buffers the batch's statistics normalize in eval too.
            training = running_mean is None and running_var is None
        try:
            y: Tensor = self._batch_norm(
                input,
                running_mean,
                running_var,
                weight,
                bias,
                training,
                momentum,
                self.eps,
                residual=residual,
                mask=mask,
                activation=activation,
                channel_dim=self.channel_dim,
                num_batches_tracked=tracked,
                nonfinite=self.nonfinite,
                nonfinite_batches=buffers.get("num_nonfinite_batches"),
            )
            return y
        except NonFiniteError as error:
            raise NonFiniteError(f"{describe(self)}: {error}") from None

    def extra_repr(self) -> str:
        base: Any = super()
        text: str = base.extra_repr()
        lacks_bias = self._parameters.get("weight") is not None and self._parameters["bias"] is None
        if lacks_bias and "bias=" not in text:  # torch.nn itself shows it from 2.13
            text += ", bias=False"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self.channel_dim != 1:
            text += f", channel_dim={self.channel_dim}"
        if self.nonfinite != "propagate":
            text += f", nonfinite={self.nonfinite!r}"
        for name in ("normalize_with", "update_stats"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)!r}"
        return text

    def __setstate__(self, state: dict[str, Any]) -> None:
        base: Any = super()
        base.__setstate__(state)
        for name, default in (
            ("activation", None),
            ("channel_dim", 1),
            ("nonfinite", "propagate"),
        ):
            self.__dict__.setdefault(name, default)
        self._buffers.setdefault("num_nonfinite_batches", None)


_ARGUMENTS = """
    Args:
        num_features: :math:`C`, the size of the channel axis (not the batch, not the number of
            layers).
        eps: added to the variance, > 0. Default 1e-5.
        momentum: the weight of the *new* batch in the running statistics (Keras' momentum is one
            minus this one); None for the cumulative average over all batches. Default 0.1.
        affine: whether there are a ``weight`` (gamma, from 1) and a ``bias`` (beta, from 0).
        track_running_stats: whether there are running statistics; without them the batch
            normalizes in eval mode too.
        device, dtype: of parameters and buffers.
        bias: False for a weight without a bias.
        activation: 'relu', 'relu6', 'leaky_relu' ('leaky_relu(0.2)'), 'hardswish', 'silu', 'gelu',
            'sigmoid', 'tanh' or None, applied in the same pass over memory.
        channel_dim: the axis of the channels; -1 for channel-last data.
        nonfinite: what a training batch with inf or NaN does to the running statistics:
            'propagate' (as torch.nn: they stay poisoned), 'skip' (they stay as they were;
            ``num_nonfinite_batches`` counts it) or 'raise' (an error that names layer and
            channels).
        normalize_with: 'batch' or 'running' statistics, whatever the mode; None for the batch's in
            training and the running ones in eval. An attribute, too.
        update_stats: whether a batch moves the running statistics, whatever the mode; None: in
            training. An attribute, too.
        domains: names of further running statistics, for ``with nw.domain(name):``.

    Call:
        ``bn(x, residual=None, mask=None, lengths=None, activation=None)``:
        ``y = activation(bn(x) + residual)``, by the layer's activation unless the call names one.
        ``residual`` has the shape of ``x``; ``mask`` is boolean with size 1 on the channel axis;
        ``lengths``, shape ``(N,)``, stand for the mask of padded ``(N, C, L)`` or ``(N, L, C)``.

    The state dict is torch.nn's, version 2, and loads both ways. Input float64, float32, bfloat16
    or float16, also with float32 parameters; statistics are taken in float64 (float32 on devices
    without it).
"""


class BatchNorm1d(_FusedBatchNorm, torch.nn.BatchNorm1d):
    __doc__ = (
        r"""Batch norm over ``(N, C)`` or ``(N, C, L)``: drop-in for :class:`torch.nn.BatchNorm1d`.

    :math:`y = (x - \mu_c) / \sqrt{\sigma_c^2 + \epsilon}\,\gamma_c + \beta_c`, with one mean and
    biased variance a channel, over all other axes (Ioffe & Szegedy 2015, algorithm 1).
"""
        + _ARGUMENTS
    )
    ranks: ClassVar[tuple[int, ...] | None] = (2, 3)


class BatchNorm2d(_FusedBatchNorm, torch.nn.BatchNorm2d):
    __doc__ = (
        r"""Batch norm over ``(N, C, H, W)``: drop-in for :class:`torch.nn.BatchNorm2d`.

    :math:`y = (x - \mu_c) / \sqrt{\sigma_c^2 + \epsilon}\,\gamma_c + \beta_c`, with one mean and
    biased variance a channel, over all other axes (Ioffe & Szegedy 2015, section 3.2).
"""
        + _ARGUMENTS
    )
    ranks: ClassVar[tuple[int, ...] | None] = (4,)


class BatchNorm3d(_FusedBatchNorm, torch.nn.BatchNorm3d):
    __doc__ = (
        r"""Batch norm over ``(N, C, D, H, W)``: drop-in for :class:`torch.nn.BatchNorm3d`.

    :math:`y = (x - \mu_c) / \sqrt{\sigma_c^2 + \epsilon}\,\gamma_c + \beta_c`, with one mean and
    biased variance a channel, over all other axes (Ioffe & Szegedy 2015, section 3.2).
"""
        + _ARGUMENTS
    )
    ranks: ClassVar[tuple[int, ...] | None] = (5,)


class BatchNorm(_FusedBatchNorm):
    __doc__ = (
        r"""Batch norm over an input of any rank from 2, with the channels on any axis.

    ``BatchNorm(C, channel_dim=-1)`` normalizes ``(N, L, C)`` or ``(N, H, W, C)`` data, where -1
    names the axis that is *kept*, as in TensorFlow, unlike the axis of a sum, which is reduced.
"""
        + _ARGUMENTS
    )
