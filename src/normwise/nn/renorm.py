"""Batch renormalization: small batches that train as eval mode will see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise import functional as F
from normwise.errors import InputError, message
from normwise.functional.batch_renorm import batch_renorm
from normwise.nn.batchnorm import _FusedBatchNorm

__all__ = ["BatchRenorm"]


class BatchRenorm(_FusedBatchNorm):
    r"""Batch renorm (Ioffe 2017) for an input of any rank.

    :math:`y = \phi\bigl((\frac{x - \mu_B}{\sigma_B}\,r + d)\,\gamma + \beta + \mathrm{res}\bigr)`,
    with :math:`r = \sigma_B / \sigma` clipped to :math:`[1/r_{max}, r_{max}]` and
    :math:`d = (\mu_B - \mu) / \sigma` clipped to :math:`[-d_{max}, d_{max}]`, constants for the
    gradient (section 3, algorithm 1). Where nothing is clipped a sample's output does not depend
    on its batch, and training does what eval mode will do.

    The limits follow the paper's schedule (section 4.1): plain batch norm (rmax 1, dmax 0) for the
    first 5,000 batches, then up in a straight line, to ``rmax`` = 3 at batch 40,000 and ``dmax`` =
    5 at 25,000. Batches are counted by ``num_batches_tracked``, which the state dict holds, so a
    resumed run goes on where it was.

    Args:
        rmax: the largest r, 1 or more.
        dmax: the largest \|d\|, 0 or more.
        schedule: ``(start, rmax_at, dmax_at)``: batches of plain batch norm, and the batch at which
            each limit is reached; None for the limits from the first batch on.
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias, activation,
            channel_dim, nonfinite, normalize_with, update_stats, domains: those of
            :class:`~normwise.nn.BatchNorm`. The paper takes momentum 0.01 and eps 1e-3.

    Call:
        ``bn(x, residual=None, mask=None, lengths=None)``, as :class:`~normwise.nn.BatchNorm`.

    Raises:
        InputError: limits below 1 and 0, a schedule that runs backwards, no running statistics.

    The running variance moves as torch.nn's (the unbiased variance enters), so that the state dict
    is that of :class:`torch.nn.BatchNorm1d` and eval mode plain batch norm; the paper averages
    :math:`\sigma`.

    Example:
        >>> import torch, normwise as nw
        >>> bn = nw.nn.BatchRenorm(3, schedule=(0, 100, 50))
        >>> [round(float(v), 2) for v in bn.limits()]
        [1.0, 0.0]
        >>> _ = bn.num_batches_tracked.fill_(25)
        >>> [round(float(v), 2) for v in bn.limits()]
        [1.5, 2.5]
    """

    rmax: float
    dmax: float
    schedule: tuple[int, int, int] | None

    def __init__(
        self,
        num_features: int,
        *args: Any,
        rmax: float = 3.0,
        dmax: float = 5.0,
        schedule: tuple[int, int, int] | None = (5000, 40000, 25000),
        **options: Any,
    ) -> None:
        super().__init__(num_features, *args, **options)
        if not (rmax >= 1 and dmax >= 0):  # NaN is neither
            raise InputError(
                message(
                    "r lies in [1 / rmax, rmax] and d in [-dmax, dmax]",
                    f"rmax={rmax}, dmax={dmax}",
                    "rmax=3, dmax=5, the paper's; rmax=1, dmax=0 is batch norm",
                )
            )
        if schedule is not None:
            start, rmax_at, dmax_at = schedule
            if not 0 <= start <= min(rmax_at, dmax_at):
                raise InputError(
                    message(
                        "a schedule is (start, rmax_at, dmax_at), in batches, start first",
                        f"{schedule}",
                        "(5000, 40000, 25000), the paper's, or None",
                    )
                )
        if not self.track_running_stats:
            raise InputError(
                message(
                    "batch renorm corrects towards the running statistics",
                    "track_running_stats=False",
                    "normwise.nn.BatchNorm for batch statistics alone",
                )
            )
        self.rmax, self.dmax, self.schedule = rmax, dmax, schedule

    def limits(self, batches: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(rmax, dmax) for the next batch, or after so many: tensors, so that no device waits."""
        tracked = self.num_batches_tracked if batches is None else batches
        if self.schedule is None or tracked is None:
            device = self.running_mean.device if self.running_mean is not None else None
            return torch.tensor(self.rmax, device=device), torch.tensor(self.dmax, device=device)
        start, rmax_at, dmax_at = self.schedule
        after = (tracked - start).to(torch.float32)

        def share(end: int) -> Tensor:
            if end == start:
                return (after >= 0).to(after.dtype)
            return (after / (end - start)).clamp(0, 1)

        return 1 + (self.rmax - 1) * share(rmax_at), self.dmax * share(dmax_at)

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
        if not training or running_mean is None or running_var is None:
            statistics = (running_mean, running_var, weight, bias)
            return F.batch_norm(input, *statistics, training, momentum, eps, **options)
        rmax, dmax = self.limits(options.get("num_batches_tracked"))
        return batch_renorm(
            input, running_mean, running_var, weight, bias, momentum, eps, rmax=rmax, dmax=dmax,
            **options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, rmax={self.rmax}, dmax={self.dmax}"
        return f"{text}, schedule={self.schedule}"
