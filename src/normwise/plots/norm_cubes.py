"""Which values share a mean and a variance: figure 2 of the group norm paper, for any norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from normwise.errors import InputError, message
from normwise.nn import BatchNorm, GroupNorm, InstanceNorm1d, LayerNorm
from normwise.plots.canvas import BLUE, INK, FilePath, canvas

__all__ = ["norm_cubes"]

Norm = str | nn.Module | Sequence[str]

NAMES = ("batch", "layer", "instance", "group")
AXES = ("N", "C", "HW")


def _made(name: str, shape: tuple[int, int, int], groups: int) -> nn.Module:
    _, c, hw = shape
    if name == "batch":
        return BatchNorm(c)
    if name == "layer":
        return LayerNorm((c, hw))
    if name == "instance":
        return InstanceNorm1d(c)
    return GroupNorm(groups, c)


def _reached(norm: nn.Module, shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """The values that the output of the first one depends on, by its gradient: the norm itself
    says what it averages."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    state = {k: v.clone() for k, v in norm.state_dict().items()}
    try:
        dtype = next((p.dtype for p in norm.parameters()), torch.float64)
        y = norm(x.to(dtype))
        (gradient,) = torch.autograd.grad(y[0, 0, 0], x)
    finally:
        norm.load_state_dict(state)
    marked: NDArray[np.bool_] = (gradient != 0).numpy()
    return marked


def _averaged(axes: Sequence[str], shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    marked = np.zeros(shape, dtype=bool)
    marked[tuple(slice(None) if a in axes else 0 for a in AXES)] = True
    return marked


def _marked(norm: Norm, shape: tuple[int, int, int], groups: int) -> tuple[str, NDArray[np.bool_]]:
    if isinstance(norm, nn.Module):
        return type(norm).__name__, _reached(norm, shape)
    if isinstance(norm, str):
        if norm in NAMES:
            return f"{norm.capitalize()} norm", _reached(_made(norm, shape, groups), shape)
    elif norm and set(norm) <= set(AXES):
        return f"over {', '.join(norm)}", _averaged(norm, shape)
    raise InputError(
        message(
            "a norm is a name, a module that takes (N, C, L), or the axes that are averaged",
            repr(norm),
            f"one of {', '.join(NAMES)}, nw.nn.GroupNorm(3, 6), or ('N', 'HW')",
        )
    )


# Isometric: channels go down to the left, samples to the right, positions down.
_C, _N, _HW = np.array([-0.866, 0.5]), np.array([0.866, 0.5]), np.array([0.0, -1.0])


def _cube(axes: Axes, title: str, marked: NDArray[np.bool_]) -> None:
    """The three faces that meet in the first value, (0, 0, 0), whose set is marked."""
    n, c, hw = marked.shape
    # Every edge of the cube has one length, whatever the shape is.
    unit_n, unit_c, unit_hw = _N / n, _C / c, _HW / hw
    faces = (
        (marked[:, :, 0], unit_n, unit_c),  # top
        (marked[0], unit_c, unit_hw),  # left: the first sample
        (marked[:, 0], unit_n, unit_hw),  # right: the first channel
    )
    for face, (values, along, down) in enumerate(faces):
        squares, colors = [], []
        for i, j in np.ndindex(values.shape):
            corner = i * along + j * down
            squares.append([corner, corner + along, corner + along + down, corner + down])
            colors.append(BLUE if values[i, j] else ("#FFFFFF", "#F6F6F6", "#EEEEEE")[face])
        axes.add_collection(PolyCollection(squares, facecolors=colors, edgecolors=INK, lw=0.5))
    bottom = _HW + np.array([0, -0.06])
    for text, place in (
        (f"C = {c}", _C / 2 + bottom + [-0.12, -0.05]),
        (f"N = {n}", _N / 2 + bottom + [0.12, -0.05]),
    ):
        axes.text(place[0], place[1], text, ha="center", va="center", color=INK, fontsize=9)
    place = _C + _HW / 2 + [-0.08, 0]
    axes.text(
        place[0],
        place[1],
        f"H·W = {hw}",
        ha="center",
        va="center",
        rotation=90,
        color=INK,
        fontsize=9,
    )
    axes.set_title(title, fontsize=11, color=INK)
    axes.set(xlim=(-1.1, 1.0), ylim=(-1.05, 1.03), aspect="equal")
    axes.set_axis_off()


def norm_cubes(
    norms: Norm | Sequence[Norm] = NAMES,
    *,
    shape: tuple[int, int, int] = (6, 6, 6),
    groups: int = 2,
    ax: Axes | Sequence[Axes] | None = None,
    path: FilePath | None = None,
) -> Figure:
    """Cubes of N samples × C channels × (H, W) positions, with the values that share a mean and a
    variance with the first one in blue (Wu & He 2018, figure 2).

    What is blue is asked of the norm: the values that have a gradient from the first output.

    Args:
        norms: which: 'batch', 'layer', 'instance', 'group'; a module that takes input of
            ``shape``, such as ``nw.nn.GroupNorm(3, 6)``; or the axes that are averaged,
            ``('N', 'HW')``. One or a list.
        shape: ``(N, C, H * W)``.
        groups: of 'group'.
        ax: axes, one for each norm.
        path: where to save the picture.

    Raises:
        InputError: a norm that is none of these, a shape that is not three sizes from 1, or one
            that the norm refuses.

    Example:
        >>> import normwise as nw
        >>> figure = nw.plots.norm_cubes(["group", nw.nn.GroupNorm(3, 6), ("N", "C", "HW")])
        >>> [axes.get_title() for axes in figure.axes]
        ['Group norm', 'GroupNorm', 'over N, C, HW']
    """
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(
            message("shape is (N, C, H * W), each from 1", repr(shape), "shape=(6, 6, 6)")
        )
    single = isinstance(norms, (str, nn.Module)) or (bool(norms) and set(norms) <= set(AXES))
    many: Any = [norms] if single else norms
    cubes = [_marked(norm, shape, groups) for norm in many]
    with canvas(ax, len(cubes), (2.6 * len(cubes), 2.8), path) as (figure, axes):
        for at, (title, marked) in zip(axes, cubes, strict=True):
            _cube(at, title, marked)
    return figure
