"""Ghost batch norm: a large batch, normalized in parts of the size that generalizes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from normwise import functional as F
from normwise.functional.ghost_batch_norm import check_ghost_size, ghost_batch_norm
from normwise.nn.batchnorm import _FusedBatchNorm

__all__ = ["GhostBatchNorm"]


class GhostBatchNorm(_FusedBatchNorm):
    r"""Batch norm of every ``ghost_size`` samples by themselves, for an input of any rank.

    In training :math:`y` is that of :class:`~normwise.nn.BatchNorm` on
    ``x.split(ghost_size)``, put together again (Hoffer, Hubara & Soudry 2017, algorithm 1; Summers
    & Dinneen 2020): the noise of small batches, which regularizes, at the speed of large ones. The
    last ghost batch may be smaller; a batch of ``ghost_size`` or fewer samples is one ghost batch.

    The running statistics take in the moments of the whole batch, the ghost batches' merged
    exactly: those of plain batch norm on the same batch, where Hoffer et al. average the ghost
    batches' one after another. In eval mode it is plain batch norm.

    Args:
        ghost_size: samples a ghost batch, 1 or more (one needs two values a channel, as any batch).
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias, activation,
            channel_dim, nonfinite, normalize_with, update_stats, domains: those of
            :class:`~normwise.nn.BatchNorm`.

    Call:
        ``bn(x, residual=None, mask=None, lengths=None)``, as :class:`~normwise.nn.BatchNorm`; the
        samples lie along axis 0 (axis 1, where the channels are axis 0).

    Raises:
        InputError: a ``ghost_size`` below 1; a ghost batch, the remainder included, of one value a
            channel.

    The state dict is that of :class:`torch.nn.BatchNorm1d`.

    Example:
        >>> import torch, normwise as nw
        >>> x = torch.randn(10, 3, 4)
        >>> ghost, plain = nw.nn.GhostBatchNorm(3, ghost_size=4), nw.nn.BatchNorm(3)
        >>> parts = torch.cat([plain(part) for part in x.split(4)])
        >>> torch.allclose(ghost(x), parts, atol=1e-6)
        True
    """

    ghost_size: int

    def __init__(self, num_features: int, *args: Any, ghost_size: int, **options: Any) -> None:
        check_ghost_size(ghost_size)
        super().__init__(num_features, *args, **options)
        self.ghost_size = ghost_size

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
        **options: Any,
    ) -> Tensor:
        statistics = (running_mean, running_var, weight, bias)
        if not training:
            return F.batch_norm(input, *statistics, training, momentum, eps, **options)
        return ghost_batch_norm(
            input, *statistics, momentum, eps, ghost_size=self.ghost_size, **options
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"
