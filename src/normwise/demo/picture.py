"""Figure 1 of the batch norm paper, drawn from a run of the demo."""

from __future__ import annotations

from typing import BinaryIO

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from ..plots.canvas import BLUE, INK, SKY, VERMILION, frame
from .network import NORMWISE, PLAIN, TORCH
from .result import DemoResult, NetworkResult

__all__ = ["draw"]


def _accuracy(axes: Axes, result: DemoResult) -> None:
    """Panel (a). torch.nn's curve lies under normwise's, wide, so that both can be seen."""
    plain, torch, ours = (result.networks[name] for name in (PLAIN, TORCH, NORMWISE))
    axes.plot(
        torch.looks, torch.accuracies, color=SKY, lw=5, alpha=0.6, label="batch norm: torch.nn"
    )
    axes.plot(ours.looks, ours.accuracies, color=BLUE, lw=1.5, label="batch norm: normwise")
    axes.plot(plain.looks, plain.accuracies, color=VERMILION, lw=1.5, label="no batch norm")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="lower right", frameon=False, reverse=True)


def _sigmoid_inputs(axes: Axes, network: NetworkResult, color: str) -> None:
    """Panels (b) and (c). The start is left out: no statistics have been learned there."""
    steps = network.looks[1:]
    low, middle, high = (network.sigmoid_inputs[q][1:] for q in (15, 50, 85))
    axes.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
    for name, curve, width in (("85th", high, 1.0), ("50th", middle, 1.8), ("15th", low, 1.0)):
        axes.plot(steps, curve, color=color, lw=width)
        axes.annotate(
            name,
            (steps[-1], curve[-1]),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=10,
        )


def _frame(axes: Axes, title: str) -> None:
    frame(axes, title, "training step", axes.get_ylabel(), size=12)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def draw(result: DemoResult, file: BinaryIO) -> None:
    """Writes the picture to ``file`` as PNG, 1,900 pixels wide, whatever the user's style is."""
    with matplotlib.style.context("default"):
        # Not pyplot: that would choose a backend for the caller's own pictures.
        figure = Figure(figsize=(9.5, 3.5), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
        right.sharey(middle)
        _accuracy(left, result)
        _sigmoid_inputs(middle, result.networks[PLAIN], VERMILION)
        _sigmoid_inputs(right, result.networks[NORMWISE], BLUE)
        middle.set_ylabel("percentile of the input", color=INK)
        _frame(left, "(a) Test accuracy")
        _frame(middle, "(b) Sigmoid input, no batch norm")
        _frame(right, "(c) Sigmoid input, batch norm")
        figure.savefig(file, format="png", facecolor="white", metadata={"Software": "normwise"})
