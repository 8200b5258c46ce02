"""Running statistics chase the data's, each momentum at its own speed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from normwise.errors import InputError, message
from normwise.functional import batch_moments
from normwise.nn import BatchNorm1d
from normwise.plots.canvas import COLORS, GRAY, FilePath, canvas, frame

__all__ = ["momentum_chase"]


def _jump() -> list[Tensor]:
    """80 batches of 64 from N(2, 1), then 80 from N(-1, 4)."""
    normal = torch.randn(160, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [*(2 + normal[:80]), *(2 * normal[80:] - 1)]


def momentum_chase(
    data: Iterable[Tensor] | None = None,
    momenta: Sequence[float | None] = (0.5, 0.1, 0.02, None),
    *,
    ax: Sequence[Axes] | None = None,
    path: FilePath | None = None,
) -> Figure:
    r"""Running mean and running variance after each batch, for several momenta.

    :math:`r \leftarrow (1 - m)\, r + m\, s` with the batch's mean or unbiased variance s; None is
    the average over all batches so far. They start from 0 and 1. A small m is calm and late, a
    large one fast and shaky; after a change in the data :math:`(1 - m)^k` of the old statistic is
    left after k batches.

    Args:
        data: batches of one channel, any shape; 160 batches of 64 if None, from N(2, 1) and, from
            the 80th on, from N(-1, 4).
        momenta: momenta as of torch.nn (the weight of the new batch; Keras' is one minus that).
        ax: two axes.
        path: where to save the picture.

    Raises:
        InputError: no batch, no momentum, or a batch of fewer than two values.

    Example:
        >>> import torch, normwise as nw
        >>> figure = nw.plots.momentum_chase([torch.randn(32) for _ in range(5)], momenta=[0.1])
        >>> figure.axes[0].get_title(loc="left")
        'running mean'
    """
    batches = [
        b.detach().to("cpu", torch.float64).reshape(-1, 1)
        for b in (_jump() if data is None else data)
    ]
    if not batches or not momenta or min(map(len, batches)) < 2:
        raise InputError(
            message(
                "running statistics move by batches of two values at least, each momentum its way",
                f"{len(batches)} batches and {len(momenta)} momenta",
                "data=[x1, x2, …], momenta=[0.1]",
            )
        )
    moments = [batch_moments(b) for b in batches]
    seen = (
        [float(m.mean) for m in moments],
        [float(m.variance(1)) for m in moments],
    )
    layers = [BatchNorm1d(1, momentum=m, affine=False, dtype=torch.float64) for m in momenta]
    paths: list[tuple[list[float], list[float]]] = [([0.0], [1.0]) for _ in layers]
    for batch in batches:
        for layer, (means, variances) in zip(layers, paths, strict=True):
            layer(batch)
            assert layer.running_mean is not None
            assert layer.running_var is not None
            means.append(float(layer.running_mean))
            variances.append(float(layer.running_var))
    steps = range(1, len(batches) + 1)
    with canvas(ax, 2, (9.5, 3.4), path) as (figure, axes):
        for i, (at, title) in enumerate(
            zip(axes, ("running mean", "running variance"), strict=True)
        ):
            at.plot(steps, seen[i], ".", color=GRAY, ms=3, alpha=0.7, label="of the batch")
            for j, (momentum, curves) in enumerate(zip(momenta, paths, strict=True)):
                label = f"momentum {momentum}" if momentum is None else f"momentum {momentum:g}"
                at.plot(curves[i], color=COLORS[j % len(COLORS)], lw=1.6, label=label)
            frame(at, title, "batches")
        axes[1].legend(frameon=False, fontsize=9)
    return figure
