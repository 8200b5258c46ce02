"""What the pictures share: a figure that belongs to nobody else, colours, frames, saving."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from normwise.errors import InputError, message
from normwise.files import write_atomically

__all__ = [
    "BLUE",
    "COLORS",
    "FilePath",
    "GRAY",
    "GREEN",
    "GRID",
    "INK",
    "SKY",
    "VERMILION",
    "canvas",
    "frame",
]

# Okabe and Ito's colours, told apart by the colour-blind too; https://jfly.uni-koeln.de/color/
VERMILION, BLUE, GREEN, ORANGE, PURPLE = "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7"
SKY = "#56B4E9"
COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE)
INK, GRAY, GRID = "#333333", "#8A8A8A", "#DDDDDD"

FilePath = str | os.PathLike[str]


@contextlib.contextmanager
def canvas(
    ax: Axes | Sequence[Axes] | None,
    panels: int,
    size: tuple[float, float],
    path: FilePath | None,
    **subplots: Any,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Panels to draw on in the block; saved at its end if there is a path.

    A figure of our own looks the same whatever the user's style is, and is not pyplot's: that
    would choose a backend for the caller's pictures. On axes that were given the user's style
    holds.
    """
    if ax is None:
        with matplotlib.style.context("default"):
            figure = Figure(figsize=size, dpi=100, layout="constrained")
            FigureCanvasAgg(figure)
            made = figure.subplots(1, panels, squeeze=False, **subplots)
            yield figure, list(made.flat)
            _save(figure, path)
        return
    axes = [ax] if isinstance(ax, Axes) else list(ax)
    if len(axes) != panels:
        raise InputError(
            message(
                f"each of the {panels} panels has axes of its own",
                f"{len(axes)} axes",
                f"figure.subplots(1, {panels}) as ax=",
            )
        )
    figure = axes[0].figure.get_figure(root=True)
    yield figure, axes
    _save(figure, path)


def _save(figure: Figure, path: FilePath | None) -> None:
    if path is None:
        return
    kind = Path(path).suffix.lstrip(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError(
            message(
                "a picture's suffix names a format that matplotlib writes",
                repr(os.fspath(path)),
                f"one of {', '.join(sorted(known))}",
            )
        )
    write_atomically(
        path, lambda file: figure.savefig(file, format=kind, dpi=150, facecolor="white")
    )


def frame(
    axes: Axes,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    grid: bool = True,
    size: float = 11,
) -> None:
    """Title on the left, a light grid behind, no box."""
    axes.set_title(title, loc="left", fontsize=size, color=INK)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    if grid:
        axes.grid(color=GRID, lw=0.8)
        axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
