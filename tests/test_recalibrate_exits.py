"""recalibrate, all or nothing: errors, Ctrl-C, data that are not finite, kill -9 and going on."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import IMAGES, chain, norms, split
from recalibrate_run import SEED, Loader
from torch import Tensor, nn

import normwise as nw
from normwise.errors import InputError, NonFiniteError
from normwise.tools.recalibrate import checkpoint as checkpoint_module

HERE = Path(__file__).parent
BATCHES = split(IMAGES[:400].float(), 100)


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that may not change, by value."""
    return {
        **{k: v.clone() for k, v in model.state_dict().items()},
        "buffers": [id(b) for b in model.buffers()],
        "training": [m.training for m in model.modules()],
        "momentum": [getattr(m, "momentum", None) for m in model.modules()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for m in model.modules()
        ],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    for name, now in state_of(model).items():
        was = before[name]
        assert torch.equal(now, was) if isinstance(now, Tensor) else now == was, name


def draw_and_stop(error: BaseException | None) -> Callable[[nn.Module, Tensor], Any]:
    """A forward that draws random numbers, and raises ``error`` at the third batch."""
    count = iter(range(1000))

    def forward(model: nn.Module, batch: Tensor) -> Any:
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        if next(count) == 2 and error is not None:
            raise error
        return model(batch)

    return forward


@pytest.mark.parametrize("mode", ["batch", "exact"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(3), SystemExit),
        (ValueError("not today"), InputError),
        (torch.OutOfMemoryError("no room"), torch.OutOfMemoryError),
    ],
    ids=["ctrl-c", "exit", "error", "memory"],
)
def test_any_exit_leaves_the_model_untouched(
    mode: str, inplace: bool, raised: BaseException, error: type[BaseException]
) -> None:
    model = chain()
    model[1].momentum = None
    before = state_of(model)
    with pytest.raises(error):
        nw.recalibrate(model, BATCHES, mode=mode, inplace=inplace, forward=draw_and_stop(raised))
    assert_untouched(model, before)


def test_an_exit_in_the_last_moment_leaves_the_model_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C between the first and the second layer that is written to."""
    from normwise.tools.recalibrate.layers import Layer

    write, model = Layer.write, chain()
    before = state_of(model)

    def interrupted(self: Layer, new: Any) -> None:
        if self.name == "4":
            raise KeyboardInterrupt
        write(self, new)

    monkeypatch.setattr(Layer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nw.recalibrate(model, BATCHES, mode="batch", inplace=True)
    assert_untouched(model, before)


def test_the_models_own_error_is_chained_and_has_the_batch() -> None:
    batches = [*BATCHES[:2], torch.zeros(3, 5)]
    with pytest.raises(InputError, match=r"RuntimeError for batch 2, a Tensor: ") as caught:
        nw.recalibrate(chain(), batches)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_the_loaders_own_error_is_raised() -> None:
    def broken() -> Iterator[Tensor]:
        yield BATCHES[0]
        raise OSError("disk gone")

    model = chain()
    before = state_of(model)
    with pytest.raises(OSError, match="disk gone"):
        nw.recalibrate(model, broken(), mode="batch", inplace=True)
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["batch", "exact"])
def test_nonfinite_data_are_named(mode: str, value: float) -> None:
    batches = [b.clone() for b in BATCHES]
    batches[2][7, 0, 3, 3] = value
    model = chain()
    before = state_of(model)
    with pytest.raises(NonFiniteError, match=r"before layer '1' in batch 2"):
        nw.recalibrate(model, batches, mode=mode, inplace=True)
    assert_untouched(model, before)


@pytest.mark.parametrize("mode", ["batch", "exact"])
def test_nonfinite_values_between_norms_are_named(mode: str) -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x == x.max(), torch.inf, x) if len(x) == 99 else x

    model = nn.Sequential(chain(), Breaks(), nn.BatchNorm1d(10))
    batches = [BATCHES[0], BATCHES[1][:99]]
    with pytest.raises(NonFiniteError, match=r"before layer '2' in batch 1"):
        nw.recalibrate(model, batches, mode=mode)


def test_a_variance_beyond_the_buffers_range() -> None:
    with pytest.raises(NonFiniteError, match=r"a variance up to .* buffers are torch.float16"):
        nw.recalibrate(nn.BatchNorm1d(1).half(), torch.tensor([[6e4], [-6e4]]).half(), mode="exact")


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = chain()
        self.open_file = iter(())  # generators and locks cannot be copied
        self.lock = __import__("threading").Lock()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def one_shot() -> Any:
    return iter(BATCHES)


BAD_INPUT: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "no batch norm": (lambda: nn.Linear(2, 2), BATCHES, {}, "holds batch norms"),
    "none with statistics": (
        lambda: nn.BatchNorm2d(1, track_running_stats=False),
        BATCHES,
        {},
        "no-running-statistics",
    ),
    "empty list": (chain, [], {}, "one batch at least; got none"),
    "short loader": (chain, BATCHES, {"batches": 9}, "data that ended after 4. Try: batches=4"),
    "no batches": (chain, BATCHES, {"batches": 0}, "batches is 1 or more"),
    "no data": (chain, 3, {}, "an iterable of batches; got a int"),
    "iterator": (chain, one_shot(), {}, "can be read only once. Try: list"),
    "iterator, metric": (
        chain,
        one_shot(),
        {"mode": "batch", "metric": lambda o, b: 0},
        "metric= goes through the data several times",
    ),
    "not copyable": (Uncopyable, BATCHES, {}, "cannot pickle '_thread.lock'.*inplace=True"),
    "mode": (chain, BATCHES, {"mode": "fast"}, "mode names a way; got 'fast'"),
    "blend": (chain, BATCHES, {"blend": 1.5}, "a weight from 0 to 1; got 1.5"),
    "unknown layer": (chain, BATCHES, {"layers": ["7"]}, "names norms of the model.*got '7'"),
    "other module": (chain, BATCHES, {"layers": [nn.ReLU()]}, "a ReLU not in it"),
    "group": (chain, BATCHES, {"group": object()}, "no initialised torch.distributed"),
    "never runs": (
        lambda: nn.ModuleDict({"bn": nn.BatchNorm2d(1)}),
        BATCHES,
        {"forward": lambda m, b: b},
        "runs on the data at least",
    ),
    "one value": (
        lambda: nn.BatchNorm1d(2),
        torch.ones(1, 2),
        {},
        "an unbiased variance needs two values",
    ),
    "one value in a batch": (
        lambda: nn.BatchNorm1d(2),
        [torch.ones(3, 2), torch.ones(1, 2)],
        {"mode": "batch"},
        "one value a channel .* in batch 1. Try: mode='exact'",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name: str) -> None:
    make, data, options, expected = BAD_INPUT[name]
    model = make()
    before = None if name == "not copyable" else state_of(model)
    with pytest.raises(InputError, match=expected):
        nw.recalibrate(model, data, **options)
    if before is not None:
        assert_untouched(model, before)


def test_what_cannot_be_copied_works_in_place() -> None:
    model = Uncopyable()
    assert nw.recalibrate(model, BATCHES, inplace=True).model is model


# Killed, and going on


def run(path: Path | None, loader: Any = None, mode: str = "exact", **options: Any) -> Any:
    torch.manual_seed(SEED)
    return nw.recalibrate(chain(), loader or Loader(), mode=mode, checkpoint=path, **options)


def killed(path: Path, mode: str, after: int) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "recalibrate_run.py", path, mode, str(after)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr
    assert path.exists()


@pytest.mark.parametrize(("mode", "after"), [("batch", 6), ("exact", 26)])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, mode: str, after: int) -> None:
    path = tmp_path / "recalibration"
    killed(path, mode, after)
    loader = Loader()
    resumed, report = run(path, loader, mode)
    whole_loader = Loader()
    whole, whole_report = run(None, whole_loader, mode)
    for name, norm in norms(resumed).items():
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(norm, buffer), getattr(norms(whole)[name], buffer))
    assert report.to_dict() == whole_report.to_dict()
    if mode == "exact":  # passes that were done are not done again
        assert loader.given < whole_loader.given
    assert list(tmp_path.iterdir()) == [path]


def interrupted(path: Path, batches: int = 7) -> None:
    """Leaves a checkpoint of a run that was stopped; every batch is written."""
    count = iter(range(1000))

    def forward(model: nn.Module, batch: list[Tensor]) -> Any:
        if next(count) == batches:
            raise KeyboardInterrupt
        return model(batch[0])

    with pytest.raises(KeyboardInterrupt):
        run(path, forward=forward)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    interrupted(tmp_path / "recalibration")
    return tmp_path / "recalibration"


def test_ctrl_c_can_be_gone_on_from(stopped: Path) -> None:
    resumed, _ = run(stopped)
    whole, _ = run(None)
    assert torch.equal(resumed[9].running_var, whole[9].running_var)


def test_a_finished_checkpoint_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "c")
    with pytest.raises(InputError, match="of a run that ended well"):
        run(tmp_path / "c")


@pytest.mark.parametrize("options", [{"mode": "batch"}, {"blend": 0.5}, {"batches": 9}])
def test_a_checkpoint_of_another_run_is_refused(stopped: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="written for other weights, layers"):
        run(stopped, **options)


def test_a_checkpoint_of_other_weights_is_refused(stopped: Path) -> None:
    with pytest.raises(InputError, match="written for other weights, layers"):
        nw.recalibrate(chain(seed=1), Loader(), checkpoint=stopped)


def test_other_data_are_refused(stopped: Path) -> None:
    with pytest.raises(InputError, match=r"another batch \d than before"):
        run(stopped, [b + 1 for b in split(IMAGES[:400].float(), 40)])


def test_fewer_data_are_refused(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "_SHARE", 0)
    stopped.unlink()
    interrupted(stopped)
    with pytest.raises(InputError, match="ended after 2 of the 7 batches done"):
        run(stopped, BATCHES[:2])


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("owned"),))


@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", {"format": "other"}, {"evil": Evil()}, [1, 2]],
    ids=["empty", "text", "format", "pickle", "list"],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    tmp_path: Path, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match="names a file that recalibrate wrote"):
        run(path)
    assert not (tmp_path / "owned").exists()


def test_a_truncated_checkpoint_is_refused(stopped: Path) -> None:
    stopped.write_bytes(stopped.read_bytes()[:-100])
    with pytest.raises(InputError, match="names a file that recalibrate wrote"):
        run(stopped)


def test_a_checkpoint_with_foreign_shapes_is_refused(stopped: Path) -> None:
    content = torch.load(stopped, weights_only=True)
    content["state"]["statistics"]["4"][0] = torch.zeros(99)
    torch.save(content, stopped)
    with pytest.raises(InputError, match="layer '4' have another shape"):
        run(stopped)
