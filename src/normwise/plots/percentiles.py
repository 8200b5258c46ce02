"""Percentiles through training, from a record of ``watch``."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from normwise.errors import InputError, message
from normwise.plots.canvas import BLUE, FilePath, canvas, frame
from normwise.tools.watch import WatchRecord
from normwise.tools.watch.call import SPREADS

__all__ = ["percentiles"]

SHOWN = {"input": "the input", "output": "the output", "gamma": "γ", "beta": "β"}

MOST = 4
"""Panels that are drawn where no layer is named."""


def _some(names: list[str]) -> list[str]:
    """The first, the last, and some evenly between."""
    if len(names) <= MOST:
        return names
    return [names[round(i * (len(names) - 1) / (MOST - 1))] for i in range(MOST)]


def percentiles(
    record: WatchRecord,
    layers: str | Sequence[str] | None = None,
    *,
    what: str = "input",
    mode: str = "train",
    ax: Axes | Sequence[Axes] | None = None,
    path: FilePath | None = None,
) -> Figure:
    """Percentiles of what norms saw through training, a panel for each (figure 1 of Ioffe & Szegedy
    2015).

    Bands lie between the percentiles that belong together (1 and 99, 15 and 85); a line is the one
    in the middle. Steps without finite values are gaps.

    Args:
        record: of :func:`normwise.watch`, or ``WatchRecord.load(path)``.
        layers: the names of norms; None for the first, the last and two between.
        what: 'input', 'output', 'gamma' or 'beta'.
        mode: 'train' or 'eval'.
        ax: axes, one for each layer.
        path: where to save the picture.

    Raises:
        InputError: another ``what``, or a layer without rows of this mode.

    Example:
        >>> import torch, normwise as nw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), nw.nn.BatchNorm1d(8))
        >>> with nw.watch(model, every=1) as record:
        ...     for _ in range(3):
        ...         model(torch.randn(16, 4)).square().mean().backward()
        >>> figure = nw.plots.percentiles(record)
        >>> figure.axes[0].get_title(loc="left")
        '1'
    """
    watched = [e.name for e in record.entries if e.action == "watched"]
    if isinstance(layers, str):
        layers = [layers]
    names = _some(watched) if layers is None else list(layers)
    if what not in SPREADS:
        raise InputError(message("what names a spread", repr(what), f"one of {', '.join(SPREADS)}"))
    fields = [f"{what}_p{p:g}" for p in record.percentiles]
    try:
        curves = [record.series(name, *fields, mode=mode) for name in names]
    except KeyError as error:
        raise InputError(
            message(
                f"a layer has rows of mode {mode!r}",
                f"{error}",
                f"one of {', '.join(watched)}, or the other mode",
            )
        ) from error
    if not names:
        raise InputError(
            message("a picture of percentiles shows a layer", "none", "a record with rows")
        )
    with canvas(ax, len(names), (3.2 * len(names) + 1.2, 3.2), path) as (figure, axes):
        for i, (at, name, (steps, *found)) in enumerate(zip(axes, names, curves, strict=True)):
            lines = [[float("nan") if v is None else v for v in line] for line in found]
            half = len(lines) // 2
            for outer in range(half):
                at.fill_between(
                    steps, lines[outer], lines[-1 - outer], color=BLUE, lw=0,
                    alpha=0.15 + 0.15 * outer / max(half - 1, 1),
                    label=f"{record.percentiles[outer]:g} to {record.percentiles[-1 - outer]:g} %",
                )  # fmt: skip
            if len(lines) % 2:
                middle = f"{record.percentiles[half]:g} %"
                at.plot(steps, lines[half], color=BLUE, lw=1.6, label=middle)
            frame(at, name, "training step", f"percentiles of {SHOWN[what]}" if i == 0 else "")
            at.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes[-1].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
