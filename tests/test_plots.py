"""Pictures: what is in the axes, against numbers of NumPy; and that nothing global changes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import Tensor, nn

import normwise as nw
from normwise.errors import InputError, OutputError
from normwise.plots.canvas import BLUE
from normwise.tools.watch import WatchRecord

plots = nw.plots


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    """Thousands of tiny operations: a second thread only waits for its core."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def record() -> WatchRecord:
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4))))
    with nw.watch(net, every=2) as found:
        for _ in range(5):
            net(torch.randn(16, 4)).square().mean().backward()
    return found


def titles(figure: Figure) -> list[str]:
    return [a.get_title(loc="left") or a.get_title() for a in figure.axes]


# The five


def heights(axes: Any) -> np.ndarray:
    return np.array([bar.get_height() for bar in axes.patches])


def edges(axes: Any) -> tuple[float, float]:
    return axes.patches[0].get_x(), axes.patches[-1].get_x() + axes.patches[-1].get_width()


def test_normalizing_keeps_the_shape_of_a_histogram() -> None:
    x = torch.randn(400) * 3 + 50
    figure = plots.input_histogram(x, gamma=2.0, beta=-1.0, bins=10)
    before, normalized, scaled, softmax = figure.axes
    counts, _ = np.histogram(x.double().numpy(), 10)
    assert heights(before).tolist() == counts.tolist()
    # A value within rounding of an edge may fall to the other side of it.
    assert np.abs(heights(normalized) - counts).sum() <= 2
    assert np.abs(heights(scaled) - counts).sum() <= 2
    values = x.double().numpy()
    z = (values - values.mean()) / np.sqrt(values.var() + 1e-5)
    np.testing.assert_allclose(edges(normalized), (z.min(), z.max()), rtol=1e-9)
    np.testing.assert_allclose(edges(scaled), (2 * z.min() - 1, 2 * z.max() - 1), rtol=1e-9)
    assert np.abs(heights(softmax) - counts).sum() > 100
    texts = [a.texts[0].get_text() for a in figure.axes]
    assert texts[1].splitlines() == ["mean 0", "std 1", "sum 0"]
    assert texts[3].endswith("sum 1")
    assert titles(figure)[2] == "times γ = 2, plus β = -1"


def blue(axes: Any) -> int:
    colors = np.concatenate([face.get_facecolors() for face in axes.collections])
    return int((colors == to_rgba(BLUE)).all(1).sum())


def squares(marked: np.ndarray) -> int:
    """On the three faces that meet in (0, 0, 0)."""
    return int(marked[0].sum() + marked[:, 0].sum() + marked[:, :, 0].sum())


@pytest.mark.parametrize(
    ("norm", "averaged", "title"),
    [
        ("batch", np.s_[:, 0, :], "Batch norm"),
        ("layer", np.s_[0, :, :], "Layer norm"),
        ("instance", np.s_[0, 0, :], "Instance norm"),
        ("group", np.s_[0, :2, :], "Group norm"),
        (("N", "HW"), np.s_[:, 0, :], "over N, HW"),
        (nw.nn.GroupNorm(4, 4), np.s_[0, 0, :], "GroupNorm"),
        (nn.BatchNorm1d(4), np.s_[:, 0, :], "BatchNorm1d"),
        (nw.nn.GhostBatchNorm(4, ghost_size=2), np.s_[:2, 0, :], "GhostBatchNorm"),
        (nw.nn.RMSNorm((4, 5)), np.s_[0, :, :], "RMSNorm"),
    ],
)
def test_cubes_mark_what_is_averaged(norm: Any, averaged: Any, title: str) -> None:
    marked = np.zeros((6, 4, 5), dtype=bool)
    marked[averaged] = True
    figure = plots.norm_cubes(norm, shape=(6, 4, 5))
    (axes,) = figure.axes
    assert blue(axes) == squares(marked)
    assert axes.get_title() == title
    assert [t.get_text() for t in axes.texts] == ["C = 4", "N = 6", "H·W = 5"]


def test_cubes_do_not_move_a_norms_statistics() -> None:
    norm = nn.BatchNorm1d(6)
    plots.norm_cubes(norm)
    assert int(norm.num_batches_tracked) == 0
    assert torch.equal(norm.running_mean, torch.zeros(6))
    assert norm.weight.grad is None


def test_there_are_four_cubes() -> None:
    figure = plots.norm_cubes()
    assert titles(figure) == ["Batch norm", "Layer norm", "Instance norm", "Group norm"]


def test_running_statistics_chase_the_data() -> None:
    data = [torch.randn(32) * (1 + i % 3) + i for i in range(12)]
    figure = plots.momentum_chase(data, (0.3, None))
    batches = [b.double().numpy() for b in data]
    for axes, start, of in (
        (figure.axes[0], 0.0, lambda b: b.mean()),
        (figure.axes[1], 1.0, lambda b: b.var(ddof=1)),
    ):
        seen = [of(b) for b in batches]
        dots, chase, average = axes.lines
        np.testing.assert_allclose(dots.get_ydata(), seen, rtol=1e-9)
        expected = [start]
        for s in seen:
            expected.append(0.7 * expected[-1] + 0.3 * s)
        np.testing.assert_allclose(chase.get_ydata(), expected, rtol=1e-9)
        np.testing.assert_allclose(
            average.get_ydata()[1:], np.cumsum(seen) / np.arange(1, 13), rtol=1e-9
        )
    assert titles(figure) == ["running mean", "running variance"]
    legend = figure.axes[1].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == [
        "of the batch", "momentum 0.3", "momentum None",
    ]  # fmt: skip


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_without_batch_norm_a_deep_network_says_the_same_of_everything(activation: str) -> None:
    figure = plots.activation_map(6, units=32, samples=200, activation=activation, bins=40)
    without, with_norm = figure.axes[:2]
    shares = [axes.images[0].get_array() for axes in (without, with_norm)]
    for share in shares:
        assert share.shape == (6, 40)
        np.testing.assert_allclose(share.sum(1), 1)
    spread = [[float(t.get_text()) for t in axes.texts[:6]] for axes in (without, with_norm)]
    assert spread[0][5] < 0.1 * spread[0][0]
    assert min(spread[1]) > 0.9 * max(spread[1]) > 0.1
    # Before the activation every unit has mean 0 and variance 1 over the inputs.
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    expected = float(getattr(torch, activation)(normal).std())
    assert spread[1][0] == pytest.approx(expected, rel=0.05)
    assert titles(figure)[:2] == ["without batch norm", "with batch norm"]
    assert without.get_xlabel() == f"{activation} activation"
    assert without.get_ylabel() == "layer"


def test_percentiles_are_those_of_the_record(record: WatchRecord) -> None:
    figure = plots.percentiles(record, ["1", "3"], what="output")
    assert titles(figure) == ["1", "3"]
    for axes, name in zip(figure.axes, ("1", "3"), strict=True):
        steps, low, middle, high = record.series(name, "output_p1", "output_p50", "output_p99")
        (line,) = axes.lines
        assert line.get_xdata().tolist() == steps == [0, 2, 4]
        assert line.get_ydata().tolist() == middle
        band = axes.collections[0].get_paths()[0].vertices
        assert band[:, 1].min() == pytest.approx(min(low))
        assert band[:, 1].max() == pytest.approx(max(high))
    assert figure.axes[0].get_ylabel() == "percentiles of the output"


def test_of_many_layers_four_are_shown(record: WatchRecord) -> None:
    assert titles(plots.percentiles(record)) == ["1", "5", "7", "11"]


def test_steps_without_values_are_gaps() -> None:
    layer = nn.LayerNorm(4)
    with nw.watch(layer, every=1) as found:
        for x in (torch.zeros(2, 4), torch.full((2, 4), torch.nan), torch.ones(2, 4)):
            layer(x)
    (line,) = plots.percentiles(found).axes[0].lines
    assert np.isnan(line.get_ydata()).tolist() == [False, True, False]


# What they share

PICTURES: dict[str, tuple[Callable[..., Figure], int]] = {
    "input_histogram": (plots.input_histogram, 4),
    "norm_cubes": (plots.norm_cubes, 4),
    "momentum_chase": (plots.momentum_chase, 2),
    "activation_map": (lambda **k: plots.activation_map(3, units=8, samples=40, **k), 2),
}


@pytest.mark.parametrize("name", [*PICTURES, "percentiles"])
def test_every_picture_draws_saves_and_changes_nothing(
    name: str, record: WatchRecord, tmp_path: Path
) -> None:
    draw, panels = PICTURES.get(name, (lambda **k: plots.percentiles(record, **k), 4))
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
    state = torch.get_rng_state()
    figure = draw(path=tmp_path / "picture.png")
    assert isinstance(figure, Figure)
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    own = Figure(figsize=(12, 3))
    FigureCanvasAgg(own)
    axes = own.subplots(1, panels)
    assert draw(ax=axes) is own
    assert all(a.has_data() for a in axes)
    with pytest.raises(InputError, match="axes of its own"):
        draw(ax=axes[:-1])
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend(auto_select=False) == backend
    assert torch.equal(torch.get_rng_state(), state)


def test_the_suffix_says_the_format(tmp_path: Path) -> None:
    plots.norm_cubes("batch", path=tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()


def test_a_picture_is_the_same_under_another_style() -> None:
    plain = plots.momentum_chase()
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "black"}):
        styled = plots.momentum_chase()
    assert styled.axes[0].get_facecolor() == plain.axes[0].get_facecolor()


def test_paths_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format"):
        plots.norm_cubes(path=tmp_path / "cubes.docx")
    with pytest.raises(OutputError):
        plots.norm_cubes(path=tmp_path / "none" / "cubes.png")


@pytest.mark.parametrize(
    "call",
    [
        lambda r: plots.input_histogram(torch.ones(5)),
        lambda r: plots.input_histogram(torch.tensor([1.0, torch.nan])),
        lambda r: plots.input_histogram(torch.zeros(1)),
        lambda r: plots.norm_cubes("spectral"),
        lambda r: plots.norm_cubes([("N", "H")]),
        lambda r: plots.norm_cubes(shape=(6, 6)),
        lambda r: plots.norm_cubes(shape=(6, 0, 6)),
        lambda r: plots.momentum_chase([]),
        lambda r: plots.momentum_chase([torch.ones(1)]),
        lambda r: plots.momentum_chase(momenta=[]),
        lambda r: plots.activation_map(activation="relu"),
        lambda r: plots.activation_map(0),
        lambda r: plots.percentiles(r, what="weight"),
        lambda r: plots.percentiles(r, "nothing"),
        lambda r: plots.percentiles(r, mode="eval", layers="1"),
        lambda r: plots.percentiles(WatchRecord()),
    ],
)
def test_what_cannot_be_drawn(call: Callable[[WatchRecord], Figure], record: WatchRecord) -> None:
    with pytest.raises(InputError):
        call(record)


MISSING = """
import sys
sys.modules["matplotlib"] = None
import normwise
try:
    normwise.plots
except normwise.errors.MissingDependencyError as error:
    print(error)
"""


def test_without_matplotlib_an_error_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MISSING], capture_output=True, text=True, check=True
    )
    assert "normwise[plots]" in done.stdout


def test_tensors_of_any_shape_dtype_and_graph() -> None:
    x: Tensor = torch.randn(4, 5, 6, dtype=torch.bfloat16, requires_grad=True)
    assert heights(plots.input_histogram(x, bins=7).axes[0]).sum() == 120
