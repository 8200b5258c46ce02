"""What normalization does to the numbers, and what softmax does to the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from normwise.errors import InputError, message
from normwise.nn import BatchNorm1d
from normwise.plots.canvas import BLUE, GRAY, GREEN, VERMILION, FilePath, canvas, frame

__all__ = ["input_histogram"]


def _two_humps() -> Tensor:
    """5,000 values with a shape: two thirds of N(2, 0.09), one of N(4, 0.25)."""
    normal = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.where(torch.arange(5000) % 3 < 2, 2 + 0.3 * normal, 4 + 0.5 * normal)


def input_histogram(
    x: Tensor | None = None,
    *,
    gamma: float = 0.5,
    beta: float = 2.0,
    bins: int = 60,
    ax: Sequence[Axes] | None = None,
    path: FilePath | None = None,
) -> Figure:
    r"""Four histograms: x, batch norm of x, the same with :math:`\gamma` and :math:`\beta`, and
    softmax of x.

    The first three have one shape and three axes: normalizing is
    :math:`(x - \mu) / \sqrt{\sigma^2 + \epsilon}`, then times :math:`\gamma` plus :math:`\beta`.
    It does not make the values normally distributed, and they sum to 0, not to 1. Softmax,
    :math:`e^{x_i} / \sum_j e^{x_j}`, sums to 1 and changes the shape.

    Args:
        x: one channel's values, of any shape; 5,000 values with two humps if None.
        gamma, beta: of the third panel.
        bins: of each histogram.
        ax: four axes.
        path: where to save the picture.

    Raises:
        InputError: fewer than two values, values that are not finite, or all the same.

    Example:
        >>> import torch, normwise as nw
        >>> figure = nw.plots.input_histogram(torch.randn(500), bins=20)
        >>> len(figure.axes)
        4
    """
    values = (_two_humps() if x is None else x.detach().to("cpu", torch.float64)).reshape(-1, 1)
    if len(values) < 2 or not torch.isfinite(values).all() or values.min() == values.max():
        raise InputError(
            message(
                "a histogram needs two different values, all of them finite",
                f"{len(values)} values",
                "a batch of one channel, x[:, 0]",
            )
        )
    layer = BatchNorm1d(1, dtype=torch.float64)
    with torch.no_grad():
        normalized = layer(values)
        layer.weight.fill_(gamma)
        layer.bias.fill_(beta)
        scaled = layer(values)
    panels = (
        ("inputs", values, GRAY),
        ("normalized: the same shape", normalized, BLUE),
        (f"times γ = {gamma:g}, plus β = {beta:g}", scaled, GREEN),
        ("softmax of the inputs", torch.softmax(values, 0), VERMILION),
    )
    with canvas(ax, 4, (11, 2.9), path) as (figure, axes):
        for i, (at, (title, numbers, color)) in enumerate(zip(axes, panels, strict=True)):
            found = numbers.flatten()
            at.hist(found.numpy(), bins=bins, color=color)
            figures = (found.mean(), found.std(correction=0), found.sum())
            named = zip(("mean", "std", "sum"), map(_shown, figures), strict=True)
            text = "\n".join(f"{name} {shown}" for name, shown in named)
            at.set_ylim(top=1.35 * at.get_ylim()[1])  # room for the text
            at.text(0.97, 0.95, text, transform=at.transAxes, ha="right", va="top", fontsize=9)
            at.xaxis.set_major_locator(MaxNLocator(3))
            at.xaxis.set_major_formatter("{x:g}")
            frame(at, title, "value", "count" if i == 0 else "")
    return figure


def _shown(value: Tensor) -> str:
    """Three digits; rounding errors around 0 as 0."""
    v = float(value)
    if abs(v) < 1e-9:
        return "0"
    return f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.3g}"
