"""A deep network's activations, layer by layer, with and without batch norm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from normwise.errors import InputError, message
from normwise.nn import BatchNorm1d
from normwise.plots.canvas import INK, FilePath, canvas, frame

__all__ = ["activation_map"]

ACTIVATIONS = {"sigmoid": (nn.Sigmoid, (0.0, 1.0)), "tanh": (nn.Tanh, (-1.0, 1.0))}


@torch.no_grad()
def _activations(
    x: Tensor, layers: int, units: int, activation: str, norm: bool, seed: int
) -> list[Tensor]:
    """The output of each layer, (N, units); torch.nn.Linear's distribution of weights, the same
    ones with and without the norm."""
    generator = torch.Generator().manual_seed(seed)
    act = ACTIVATIONS[activation][0]()
    found = []
    for _ in range(layers):
        bound = x.shape[1] ** -0.5
        weight = (2 * torch.rand(units, x.shape[1], generator=generator, dtype=x.dtype) - 1) * bound
        x = x @ weight.T
        if norm:
            x = BatchNorm1d(units, dtype=x.dtype)(x)
        x = act(x)
        found.append(x)
    return found


def activation_map(
    layers: int = 10,
    *,
    units: int = 100,
    samples: int = 1000,
    activation: str = "sigmoid",
    bins: int = 60,
    seed: int = 0,
    ax: Sequence[Axes] | None = None,
    path: FilePath | None = None,
) -> Figure:
    """Where the activations of each layer lie, without and with batch norm before the activation.

    The input is uniform on [0, 1], the weights as torch.nn.Linear draws them, the network
    untrained. Colour is the share of a layer's activations; the figure beside each row is how much
    a unit's output varies with the input: its standard deviation over the samples, the mean over
    the units. Without batch norm it dies out: the last layers say the same whatever comes in.

    Args:
        layers, units, samples: of the network, and how many inputs it gets.
        activation: 'sigmoid' or 'tanh'.
        bins: of activations.
        seed: of weights and inputs.
        ax: two axes.
        path: where to save the picture.

    Raises:
        InputError: another activation, or a size out of range.

    Example:
        >>> import normwise as nw
        >>> figure = nw.plots.activation_map(3, units=8, samples=50)
        >>> figure.axes[1].get_title(loc="left")
        'with batch norm'
    """
    if activation not in ACTIVATIONS or min(layers, units, bins) < 1 or samples < 2:
        raise InputError(
            message(
                f"activation is one of {', '.join(ACTIVATIONS)}, sizes are 1 or more, samples 2",
                f"{activation!r}, {layers} layers, {units} units, {samples} samples, {bins} bins",
                "activation_map(10, activation='sigmoid')",
            )
        )
    low, high = ACTIVATIONS[activation][1]
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.rand(samples, units, generator=generator, dtype=torch.float64)
    panels = []
    for norm in (False, True):
        found = _activations(x, layers, units, activation, norm, seed)
        counts = [np.histogram(a.numpy(), bins=bins, range=(low, high))[0] for a in found]
        panels.append(
            (np.stack(counts) / found[0].numel(), [float(a.std(0).mean()) for a in found])
        )
    top = max(float(shares.max()) for shares, _ in panels)
    with canvas(ax, 2, (10, 3.6), path, sharey=True) as (figure, axes):
        for at, (shares, spread), title in zip(
            axes, panels, ("without batch norm", "with batch norm"), strict=True
        ):
            image = at.imshow(
                shares, aspect="auto", cmap="Blues", norm=PowerNorm(0.5, 0, top),
                interpolation="nearest", extent=(low, high, layers + 0.5, 0.5),
            )  # fmt: skip
            for layer, deviation in enumerate(spread, 1):
                at.text(
                    1.02, layer, f"{deviation:.2g}", transform=at.get_yaxis_transform(),
                    va="center", color=INK, fontsize=9,
                )  # fmt: skip
            at.text(
                1.02, 1.02, "std over\ninputs", transform=at.transAxes, fontsize=9, color=INK,
                va="bottom",
            )  # fmt: skip
            frame(at, title, f"{activation} activation", grid=False)
            at.xaxis.set_major_locator(MaxNLocator(5))
            at.set_yticks(range(1, layers + 1))
        axes[0].set_ylabel("layer", color=INK)
        bar = figure.colorbar(image, ax=axes, label="share of the layer", pad=0.02)
        bar.outline.set_visible(False)
    return figure
