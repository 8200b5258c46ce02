"""The demo: what it trains is what it says, it can tell a wrong batch norm, it leaves no trace."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import normwise.nn
from normwise import demo
from normwise.demo import experiment, picture
from normwise.demo.data import load_digits
from normwise.demo.isolation import isolated
from normwise.demo.network import NORMS, NORMWISE, PLAIN, TORCH, Norm, SigmoidNetwork
from normwise.demo.output import prepare
from normwise.demo.result import DemoResult, _typical_unit, summarize
from normwise.demo.settings import FULL, QUICK
from normwise.demo.summary import print_summary, sparkline
from normwise.demo.train import History, _percentiles, train
from normwise.demo.verify import TOLERANCE, VERIFIED_STEPS, Difference, compare
from normwise.errors import InputError
from normwise.files import write_atomically

SHORT = replace(QUICK, steps=150)
TINY = replace(QUICK, steps=20)


@pytest.fixture(scope="module")
def short() -> Iterator[DemoResult]:
    """150 steps: batch norm is there, the network without is not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "QUICK", SHORT)
        yield demo.run(quick=True, out=None)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``quick`` 20 steps."""
    monkeypatch.setattr(experiment, "QUICK", TINY)


# The experiment


def test_digits_are_all_of_scikit_learns_split_in_two() -> None:
    from sklearn import datasets

    digits = load_digits(1200, 597, seed=5)
    assert digits.train_images.shape == (1200, 64)
    assert digits.test_images.shape == (597, 64)
    x = torch.cat([digits.train_images, digits.test_images])
    y = torch.cat([digits.train_classes, digits.test_classes])
    ours = sorted((tuple(image), c) for image, c in zip((16 * x).tolist(), y.tolist(), strict=True))
    images, classes = datasets.load_digits(return_X_y=True)
    theirs = sorted(
        (tuple(image), c) for image, c in zip(images.tolist(), classes.tolist(), strict=True)
    )
    assert ours == theirs
    assert not torch.equal(digits.train_images, load_digits(1200, 597, seed=6).train_images)


def test_the_norms_compared_are_torchs_and_ours() -> None:
    assert list(NORMS) == [PLAIN, TORCH, NORMWISE]
    assert NORMS[PLAIN] is None
    kinds = {name: type(norm(3)) for name, norm in NORMS.items() if norm is not None}
    assert kinds == {TORCH: nn.BatchNorm1d, NORMWISE: normwise.nn.BatchNorm1d}


def test_networks_are_the_papers_and_start_alike() -> None:
    networks = {name: SigmoidNetwork(norm, FULL, seed=3) for name, norm in NORMS.items()}
    weights = {
        name: [m.weight for m in network.modules() if isinstance(m, nn.Linear)]
        for name, network in networks.items()
    }
    shapes = [(100, 64), (100, 100), (100, 100), (10, 100)]
    for name, network in networks.items():
        assert [tuple(w.shape) for w in weights[name]] == shapes
        assert sum(isinstance(m, nn.Sigmoid) for m in network.modules()) == 3
        for ours, plain in zip(weights[name], weights[PLAIN], strict=True):
            assert torch.equal(ours, plain)
    kinds = [type(m).__name__ for m in networks[TORCH].to_last_sigmoid]
    assert kinds == ["Linear", "BatchNorm1d", "Sigmoid"] * 2 + ["Linear", "BatchNorm1d"]
    assert torch.cat([w.flatten() for w in weights[PLAIN]]).std().item() == pytest.approx(
        0.1, rel=0.02
    )
    other = SigmoidNetwork(None, FULL, seed=4)
    assert not torch.equal(other.to_classes[-1].weight, weights[PLAIN][-1])


def test_the_last_sigmoids_input_is_what_the_last_sigmoid_gets() -> None:
    network = SigmoidNetwork(NORMS[TORCH], FULL, seed=0).eval()
    x = torch.rand(7, 64)
    torch.testing.assert_close(
        network(x), network.to_classes[-1](network.to_last_sigmoid(x).sigmoid())
    )


def test_steps_are_interleaved_and_the_first_changes() -> None:
    calls: list[str] = []

    class Noting(nn.Identity):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                calls.append(self.name)
            return super().forward(x)

    def noting(name: str) -> Norm:
        return lambda units: Noting(name)

    settings = replace(TINY, steps=4, hidden_layers=1)
    train(
        {name: noting(name) for name in "abc"},
        settings,
        load_digits(1200, 597, 0),
        weights_seed=0,
        order_seed=0,
    )
    assert "".join(calls) == "abcbcacababc"


def test_an_epoch_shows_every_image_once() -> None:
    shown: list[torch.Tensor] = []

    class Keeping(nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                shown.append(x.detach().clone())
            return super().forward(x)

    digits = load_digits(1200, 597, 0)
    settings = replace(TINY, steps=20, hidden_layers=1, hidden_units=64)
    with pytest.MonkeyPatch.context() as patch:
        # An identity in place of the first layer: what the norm sees is the images.
        patch.setattr(nn.init, "normal_", lambda w, **_: w.data.copy_(torch.eye(*w.shape)))
        frozen = replace(settings, learning_rate=0.0)
        train({"x": lambda units: Keeping()}, frozen, digits, weights_seed=0, order_seed=1)
    assert [len(batch) for batch in shown] == [60] * 20
    rows = sorted(map(tuple, torch.cat(shown).tolist()))
    assert rows == sorted(map(tuple, digits.train_images.tolist()))
    assert not torch.equal(shown[0], digits.train_images[:60])


def test_batch_norm_is_there_sooner(short: DemoResult) -> None:
    assert short.networks[PLAIN].steps_to_90 is None
    for name in (TORCH, NORMWISE):
        network = short.networks[name]
        assert network.steps_to_90 is not None
        assert network.final_accuracy > 0.9 > short.networks[PLAIN].final_accuracy
        at = network.looks.index(network.steps_to_90)
        assert network.accuracies[at] >= 0.9 > max(network.accuracies[:at])


def test_the_two_batch_norms_agree(short: DemoResult) -> None:
    assert short.passed
    # Far inside the tolerance: what it leaves room for is other machines and longer training.
    assert short.agreement.training_loss.largest < TOLERANCE / 10
    assert short.agreement.test_loss.largest < TOLERANCE / 10
    assert short.agreement.verified_steps == 150


def test_looks_percentiles_and_times_are_complete(short: DemoResult) -> None:
    for network in short.networks.values():
        assert network.looks == list(range(0, 151, 10))
        assert len(network.accuracies) == len(network.test_losses) == 16
        low, middle, high = (network.sigmoid_inputs[q] for q in (15, 50, 85))
        assert all(a <= b <= c for a, b, c in zip(low, middle, high, strict=True))
        assert network.step_ms > 0
        assert network.test_losses[-1] < network.test_losses[0]


def test_the_seed_determines_everything_but_the_times(tiny: None) -> None:
    def untimed(result: DemoResult) -> dict[str, Any]:
        plain = result.to_dict()
        del plain["seconds"], plain["step_time_ratio"]
        for network in plain["networks"].values():
            del network["step_ms"]
        return plain

    first, again, other = (untimed(demo.run(True, seed, None)) for seed in (1, 1, 2))
    assert first == again
    assert first["networks"] != other["networks"]


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0", None])
def test_a_seed_is_an_integer_from_zero(seed: Any) -> None:
    with pytest.raises(InputError, match=r"seed must be an integer >= 0; got .*Try:"):
        demo.run(quick=True, seed=seed, out=None)


# The verification


class _Formula(nn.BatchNorm1d):
    """Batch norm spelled out in float64, with the usual mistakes to order."""

    def __init__(
        self, units: int, *, correction: int = 0, running_correction: int = 1, eps: float = 1e-5
    ) -> None:
        super().__init__(units, eps=eps)
        self.correction, self.running_correction = correction, running_correction

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        x = x.double()
        if self.training:
            with torch.no_grad():
                mean.lerp_(x.mean(0).float(), 0.1)
                var.lerp_(x.var(0, correction=self.running_correction).float(), 0.1)
            mean, var = x.mean(0), x.var(0, correction=self.correction)
        y = (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias
        return y.float()


def _against_torch(norm: Norm) -> demo.Agreement:
    with isolated():
        histories = train(
            {TORCH: NORMS[TORCH], "other": norm},
            replace(QUICK, steps=100),
            load_digits(1200, 597, 0),
            weights_seed=0,
            order_seed=0,
        )
    return compare(histories[TORCH], histories["other"])


def test_another_rounding_passes_the_verification() -> None:
    agreement = _against_torch(_Formula)
    assert agreement.passed
    assert 0 < agreement.training_loss.largest < TOLERANCE / 10


@pytest.mark.parametrize(
    ("mistake", "shows_in_training"),
    [({"correction": 1}, True), ({"eps": 1e-3}, True), ({"running_correction": 0}, False)],
    ids=["unbiased variance", "epsilon of Keras", "biased running variance"],
)
def test_a_wrong_batch_norm_fails_the_verification(
    mistake: dict[str, Any], shows_in_training: bool
) -> None:
    agreement = _against_torch(lambda units: _Formula(units, **mistake))
    assert not agreement.passed
    assert agreement.verified_test_loss.largest > 10 * TOLERANCE
    assert (agreement.verified_training_loss.largest > 10 * TOLERANCE) == shows_in_training


def test_a_loss_that_is_not_a_number_fails_the_verification() -> None:
    sound = History(losses=[2.0, 1.0, 0.5], looks=[0, 3], test_losses=[2.0, 1.0])
    broken = replace(sound, losses=[2.0, 9.0, float("nan")])
    agreement = compare(sound, broken)
    assert not agreement.passed
    assert agreement.training_loss.step == 3
    assert compare(sound, sound).passed
    assert compare(sound, replace(sound, test_losses=[2.0, 1.5])).test_loss.step == 3


def test_the_verdict_is_about_the_first_steps_only() -> None:
    steps = VERIFIED_STEPS + 2
    looks = [0, VERIFIED_STEPS, VERIFIED_STEPS + 1]
    sound = History(losses=[1.0] * steps, looks=looks, test_losses=[1.0] * 3)
    late = replace(sound, losses=[1.0] * VERIFIED_STEPS + [1.0, 1.5], test_losses=[1.0, 1.0, 2.0])
    agreement = compare(sound, late)
    assert agreement.passed
    assert agreement.training_loss == Difference(0.5, steps)
    assert agreement.test_loss == Difference(1.0, VERIFIED_STEPS + 1)
    last = [1.0] * (VERIFIED_STEPS - 1) + [1.5, 1.0, 1.0]
    assert not compare(sound, replace(sound, losses=last)).passed
    assert not compare(sound, replace(sound, test_losses=[1.0, 1.5, 1.0])).passed


# The result


def test_percentiles_are_by_nearest_rank() -> None:
    values = np.random.default_rng(0).normal(5, 2, (597, 4)).astype(np.float32)
    expected = np.percentile(values, [15, 50, 85], axis=0, method="nearest")
    np.testing.assert_array_equal(_percentiles(values), expected)


def test_the_typical_unit_ranks_in_the_middle_of_all_networks() -> None:
    a = np.array([5, 1, 3, 2, 4], dtype=np.float32)
    assert _typical_unit([a, a]) == 2
    # In the second, unit 2 is the most extreme and unit 4 the middle; unit 4 is next in the first.
    assert _typical_unit([a, np.array([1, 2, 9, 4, 3], dtype=np.float32)]) == 4


def _result(moves: dict[str, list[float]], losses: list[float]) -> DemoResult:
    """A result from made-up histories of one unit."""
    histories = {
        name: History(
            losses=losses,
            step_seconds=[1.0, 3.0, 2.0],
            looks=[0, 1, 2, 3],
            accuracies=[0.1, 0.92, 0.89, 0.95],
            test_losses=[1.0] * 4,
            sigmoid_inputs=[np.array([[m - 1], [m], [m + 1]], dtype=np.float32) for m in medians],
        )
        for name, medians in moves.items()
    }
    return summarize(
        histories, seed=0, quick=True, settings=TINY, seconds=1.0, picture=Path("a") / "b.png"
    )


def test_the_result_is_read_off_the_histories() -> None:
    moves = {PLAIN: [9.0, 1, 4, 2], TORCH: [0.0, 1, 1, 2], NORMWISE: [0.0, 1, 1, 2]}
    result = _result(moves, [1.0, 2.0, 3.0])
    network = result.networks[PLAIN]
    assert (network.steps_to_90, network.steps_to_95, network.final_accuracy) == (1, 3, 0.95)
    assert network.step_ms == 2000
    assert network.drift == 3  # from 1 to 4: the start at 9 is not training yet
    assert network.sigmoid_inputs == {15: [8, 0, 3, 1], 50: [9, 1, 4, 2], 85: [10, 2, 5, 3]}
    assert result.step_time_ratio == 1
    assert result.passed


def test_the_dictionary_is_json_even_when_training_diverged() -> None:
    moves = {name: [0.0, 1, 1, float("nan")] for name in NORMS}
    result = _result(moves, [1.0, float("inf"), float("nan")])
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["agreement"]["passed"] is False
    assert plain["agreement"]["training_loss"] == {"largest": None, "step": 2}
    assert plain["networks"][NORMWISE]["sigmoid_inputs"]["50"] == [0, 1, 1, None]
    assert plain["picture"] == str(Path("a") / "b.png")


# The summary


def test_sparkline_spans_the_levels() -> None:
    assert sparkline([0.0, 0.49, 0.5, 1.0], "ab", width=4) == "aabb"
    assert sparkline([0.0, 1.0], "0123456789", width=4) == "0099"
    assert len(sparkline([0.5] * 301, "ab", width=48)) == 48


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_summary_says_it_all_in_any_encoding(short: DemoResult, encoding: str) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    result = replace(short, picture=Path("häuser") / "batch-norm.png")
    print_summary(result, Console(file=file, width=80, color_system=None))
    file.flush()
    text = raw.getvalue().decode(encoding)
    rows = [line for line in text.splitlines() if " torch.nn " in line or " none " in line]
    ours = short.networks[TORCH]
    assert "- not reached" in rows[0]
    assert f" {ours.steps_to_90} " in rows[1]
    assert f"{ours.final_accuracy:.1%}" in rows[1]
    assert "agree: in the first 150 steps" in text
    assert "9999999" in text if encoding == "ascii" else "███████" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "batch-norm.png" in text


def test_the_summary_tells_of_disagreement(short: DemoResult) -> None:
    file = io.StringIO()
    bad = replace(short, agreement=replace(short.agreement, tolerance=-1.0))
    print_summary(bad, Console(file=file, width=80))
    assert "DISAGREE" in file.getvalue()


# The picture


def _is(pixels: Any, color: str) -> Any:
    wanted = np.array(matplotlib.colors.to_rgb(color))
    return (np.abs(pixels[..., :3] - wanted) < 0.05).all(axis=-1)


def test_the_picture_shows_the_curves_in_their_panels(tiny: None, tmp_path: Path) -> None:
    def settings() -> tuple[str | None, dict[str, Any]]:
        # Reading rcParams["backend"] itself would choose one.
        others = {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
        return matplotlib.get_backend(auto_select=False), others

    before = settings()
    result = demo.run(quick=True, out=tmp_path / "new" / "folder")
    assert settings() == before
    assert result.picture == tmp_path / "new" / "folder" / "batch-norm.png"
    assert list(result.picture.parent.iterdir()) == [result.picture]
    pixels = matplotlib.image.imread(result.picture)
    assert pixels.shape[:2] == (700, 1900)
    a, b, c = pixels[:, :650], pixels[:, 750:1250], pixels[:, 1350:]
    assert _is(a, picture.VERMILION).sum() > 200
    assert _is(a, picture.BLUE).sum() > 200
    assert _is(b, picture.VERMILION).sum() > 200
    assert _is(b, picture.BLUE).sum() == 0
    assert _is(c, picture.BLUE).sum() > 200
    assert _is(c, picture.VERMILION).sum() == 0


def test_the_picture_ignores_the_users_style(short: DemoResult) -> None:
    plain, styled = io.BytesIO(), io.BytesIO()
    picture.draw(short, plain)
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "lines.linewidth": 9}):
        picture.draw(short, styled)
    assert plain.getvalue() == styled.getvalue()


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def half(file: Any) -> None:
        file.write(b"ha")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_atomically(path, half)
    assert path.read_bytes() == b"old"
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(demo.OutputError, match=r"writable; got .*a\.png"):
        write_atomically(tmp_path / "a.png", lambda file: None)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_an_output_directory_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained before the directory was checked")

    monkeypatch.setattr(experiment, "train", never)
    for out in (file, file / "below"):
        with pytest.raises(demo.OutputError, match=r"got '.*file.*Try: --out"):
            demo.run(quick=True, out=out)
    assert prepare(tmp_path / "x" / "y").is_dir()
    assert list((tmp_path / "x" / "y").iterdir()) == []


# No trace


def _stop(done: int, steps: int) -> None:
    if done:
        raise KeyboardInterrupt


@pytest.mark.parametrize("progress", [None, _stop], ids=["finished", "interrupted"])
def test_the_callers_state_stays(tiny: None, progress: Callable[[int, int], None] | None) -> None:
    def state() -> tuple[object, ...]:
        return (
            torch.get_rng_state().tolist(),
            # The global generator, which is what must stay; its stub allows a dict as well.
            np.random.get_state(legacy=True)[1].tolist(),  # type: ignore[index]  # noqa: NPY002
            random.getstate(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
        )

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = state()
        if progress is None:
            demo.run(quick=True, out=None)
        else:
            with pytest.raises(KeyboardInterrupt):
                demo.run(quick=True, out=None, progress=progress)
        assert state() == before
    finally:
        torch.set_num_threads(threads)


def test_the_callers_settings_do_not_reach_the_demo(tiny: None) -> None:
    expected = demo.run(quick=True, out=None).networks[NORMWISE].test_losses
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu"):
            got = demo.run(quick=True, out=None).networks[NORMWISE].test_losses
            assert torch.is_autocast_enabled("cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert got == expected


def test_progress_is_told_at_every_look(tiny: None) -> None:
    told: list[tuple[int, int]] = []
    demo.run(quick=True, out=None, progress=lambda done, steps: told.append((done, steps)))
    assert told == [(0, 20), (10, 20), (20, 20)]


def test_missing_packages_are_named(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(demo.MissingDependencyError) as caught:
        demo.run(quick=True)
    assert "cannot import matplotlib." in str(caught.value)
    assert 'pip install "normwise[demo]"' in str(caught.value)
    # No picture, no need of matplotlib.
    assert demo.run(quick=True, out=None).picture is None


def test_importing_imports_none_of_the_extras() -> None:
    code = (
        "import sys, normwise, normwise.demo, normwise.cli\n"
        "print({'matplotlib', 'sklearn', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# The page


def test_a_page_has_what_the_tools_made_of_the_network(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "QUICK", SHORT)
        result = demo.run(quick=True, out=None, page=tmp_path / "new" / "page.html")
    care = result.aftercare
    assert care is not None
    assert care.passed
    assert care.recalibration.facts["self_consistent"] is True
    assert [e.action for e in care.fold] == ["folded"] * 3
    assert care.accuracies["trained"] == result.networks[NORMWISE].final_accuracy
    assert care.accuracies["folded"] == care.accuracies["recalibrated"] > 0.9
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["aftercare"]["fold"]["title"] == "fold"
    assert plain["page"] == str(result.page)
    assert result.page is not None
    page = result.page.read_text()
    assert all(title in page for title in ("demo", "check", "recalibration", "fold"))
    assert len(page) < 5e6
    file = io.StringIO()
    print_summary(result, Console(file=file, width=80))
    assert "fold: 3 batch norms: 3 folded" in file.getvalue()


def test_a_page_that_cannot_be_written_is_found_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(demo.OutputError, match="--html with a file in another directory"):
        demo.run(quick=True, out=None, page=tmp_path / "file" / "page.html")
