"""recalibrate: exact statistics, whatever the batches, the calls and the layers are."""

from __future__ import annotations

import json
import runpy
import sys
from collections import OrderedDict
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import CLASSES, IMAGES, chain, errors, exact_statistics, norms, split
from oracle import moments
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw
from normwise.errors import InputError

ROWS = torch.randn(37, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3 + 7


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    """Thousands of tiny operations: a second thread only waits for its core."""
    torch.set_num_threads(1)


def expect(norm: nn.Module, x: Tensor, axis: int = 1, mask: Tensor | None = None) -> None:
    """The norm's statistics are those of ``x``."""
    m = moments(x.double().numpy(), axis, None if mask is None else mask.numpy())
    tolerance = 1e-12 if norm.running_var.dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(norm.running_mean.numpy(), m.mean, rtol=tolerance, atol=1e-9)
    np.testing.assert_allclose(
        norm.running_var.numpy(), m.m2 / (m.count - 1), rtol=tolerance, atol=1e-9
    )


# The statistics of a chain, against NumPy's of the whole data


@pytest.mark.parametrize("size", [7, 32, 1797])
@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"]
)
def test_chain_is_exact(size: int, dtype: torch.dtype, allowed: float) -> None:
    model = chain(dtype)
    new, report = nw.recalibrate(model, split(IMAGES.to(dtype), size))
    assert max(errors(new, exact_statistics(model, IMAGES))) < allowed
    assert report.facts["passes"] == 4  # three norms in a row, and the pass that checks


@pytest.mark.parametrize("size", [1, 2])
def test_small_batches_are_exact(size: int) -> None:
    images = IMAGES[:201]
    model = chain(torch.float64)
    new, _ = nw.recalibrate(model, split(images, size))
    assert max(errors(new, exact_statistics(model, images))) < 1e-12


def test_outputs_have_mean_beta_and_the_promised_variance() -> None:
    model, report = nw.recalibrate(chain().eval(), split(IMAGES.float(), 64))
    seen: dict[str, list[Tensor]] = {}
    for name, norm in norms(model).items():
        norm.register_forward_hook(lambda m, a, y, name=name: seen.setdefault(name, []).append(y))
    with torch.no_grad():
        for batch in split(IMAGES.float(), 100):
            model(batch)
    for name, norm in norms(model).items():
        m = moments(torch.cat(seen[name]).double().numpy())
        gamma, beta = norm.weight.detach().double().numpy(), norm.bias.detach().double().numpy()
        sigma2 = norm.running_var.double().numpy()
        unbiased = (m.count - 1) / m.count
        np.testing.assert_allclose(m.mean, beta, atol=1e-5)
        np.testing.assert_allclose(
            m.var, gamma**2 * sigma2 * unbiased / (sigma2 + norm.eps), atol=1e-5
        )
    assert report.facts["self_consistent"] is True
    assert all(entry.facts["checked"] == "output" for entry in report)


def test_the_variance_between_batches_counts() -> None:
    """update_bn averages batch variances: here they are 1, of data with variance 101."""
    low, high = torch.tensor([[-11.0], [-9.0]]), torch.tensor([[9.0], [11.0]])
    bn = nn.BatchNorm1d(1, momentum=None)
    torch.optim.swa_utils.update_bn([low, high], bn)
    assert float(bn.running_var) == 2
    model, _ = nw.recalibrate(bn, [low, high], mode="batch")
    assert float(model.running_var) == pytest.approx(404 / 3)


def test_a_short_batch_counts_by_its_size() -> None:
    bn = nn.BatchNorm1d(5).double()
    model, _ = nw.recalibrate(bn, split(ROWS, 8), mode="batch")
    expect(model, ROWS)


def test_modes_agree_on_the_first_layer_alone() -> None:
    batches = split(IMAGES.double(), 200)
    by_batch, _ = nw.recalibrate(chain(torch.float64), batches, mode="batch")
    exact, _ = nw.recalibrate(chain(torch.float64), batches)
    first, last = norms(exact)["1"], norms(exact)["9"]
    assert_close(norms(by_batch)["1"].running_var, first.running_var, rtol=1e-12, atol=0)
    assert not torch.allclose(norms(by_batch)["9"].running_var, last.running_var, rtol=1e-6)


def test_batch_mode_normalizes_by_the_batch() -> None:
    """As training does: the second norm sees what the first makes of each batch."""
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5)).double()
    new, _ = nw.recalibrate(model, split(ROWS, 10), mode="batch")
    parts = [
        torch.tanh((b - b.mean(0)) / (b.var(0, unbiased=False) + 1e-5).sqrt())
        for b in split(ROWS, 10)
    ]
    expect(new[2], torch.cat(parts))


def test_batch_mode_takes_single_images() -> None:
    model, _ = nw.recalibrate(nn.BatchNorm2d(1).double(), split(IMAGES[:50], 1), mode="batch")
    expect(model, IMAGES[:50])


@pytest.mark.parametrize("mode", ["batch", "exact"])
def test_only_norms_are_in_training(mode: str) -> None:
    flags: dict[str, bool] = {}

    class Watch(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            flags["dropout"] = self.training
            return super().forward(x)

    model = nn.Sequential(nn.BatchNorm1d(5), Watch(0.5)).double().train()
    model[0].register_forward_hook(lambda m, a, y: flags.update(norm=m.training))
    nw.recalibrate(model, ROWS, mode=mode)
    assert flags == {"dropout": False, "norm": mode == "batch"}


def test_shuffled_data_settle() -> None:
    loader = DataLoader(TensorDataset(IMAGES.float()), batch_size=50, shuffle=True)
    new, report = nw.recalibrate(chain(), loader)
    assert max(errors(new, exact_statistics(chain(), IMAGES))) < 2e-6
    assert report.facts["self_consistent"]


def test_a_large_mean_stays_exact() -> None:
    x = ROWS + 1e6
    model, _ = nw.recalibrate(nn.BatchNorm1d(5).double(), split(x, 5), mode="batch")
    m = moments(x.numpy())
    np.testing.assert_allclose(model.running_var.numpy(), m.m2 / 36, rtol=1e-9)


def test_poisoned_statistics_are_repaired() -> None:
    model = chain(torch.float64)
    for norm in norms(model).values():
        norm.running_mean.fill_(float("nan"))
        norm.running_var.fill_(float("inf"))
    new, _ = nw.recalibrate(model, split(IMAGES, 100))
    assert max(errors(new, exact_statistics(model, IMAGES))) < 1e-12


def test_constant_channels() -> None:
    model, report = nw.recalibrate(nn.BatchNorm1d(2), torch.full((8, 2), 3.0))
    assert model.running_var.tolist() == [0, 0]
    assert report.facts["self_consistent"]


# Layers of every kind


class Twice(nn.Module):
    """One norm on two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(x) + self.bn(3 * x + 1)
        return y


@pytest.mark.parametrize("mode", ["batch", "exact"])
def test_a_layer_called_twice_pools_its_calls(mode: str) -> None:
    model, report = nw.recalibrate(Twice().double(), split(ROWS, 10), mode=mode)
    expect(model.bn, torch.cat([ROWS, 3 * ROWS + 1]))
    assert report["bn"].facts["batches"] == 4


@pytest.mark.parametrize("poison", [False, True])
def test_a_layer_that_feeds_itself_reaches_its_fixed_point(poison: bool) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(torch.tanh(self.bn(x)) + 0.1 * x)

    source = Recurrent().double()
    if poison:
        source.bn.running_var.fill_(float("nan"))
    model, report = nw.recalibrate(source, split(ROWS, 10))
    assert report.facts["self_consistent"]
    y = (ROWS - model.bn.running_mean) / (model.bn.running_var + 1e-5).sqrt()
    seen = torch.cat([ROWS, torch.tanh(y) + 0.1 * ROWS])
    m = moments(seen.numpy())
    np.testing.assert_allclose(model.bn.running_var.numpy(), m.m2 / (m.count - 1), rtol=1e-9)


def test_passes_are_as_many_as_norms_depend_on_one_another() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.BatchNorm1d(5) for _ in range(6))
            self.last = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.stack([torch.tanh(b(x)) for b in self.branches]).sum(0))

    _, report = nw.recalibrate(Branches().double(), split(ROWS, 10))
    assert report.facts["passes"] == 2 + 1  # two in a row; the last checks


def test_masked_elements_stay_out() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nw.nn.BatchNorm1d(5)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.bn(x, mask=mask)
            return y

    x = torch.randn(6, 5, 8, dtype=torch.float64)
    mask = torch.rand(6, 1, 8) < 0.6
    x = torch.where(mask, x, torch.nan)
    batches = list(zip(x.split(2), mask.split(2), strict=True))
    for mode in ("exact", "batch"):
        model, _ = nw.recalibrate(Masked().double(), batches, mode=mode)
        expect(model.bn, x, mask=mask)


@pytest.mark.parametrize("mode", ["exact", "batch"])
def test_padding_stays_out_by_lengths(mode: str) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nw.nn.BatchNorm1d(5)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            y: Tensor = self.bn(x, lengths=lengths)
            return y

    x = torch.randn(6, 5, 8, dtype=torch.float64)
    lengths = torch.tensor([8, 3, 5, 1, 7, 2])
    mask = torch.arange(8).expand(6, 1, 8) < lengths.view(6, 1, 1)
    x = torch.where(mask, x, torch.nan)
    batches = list(zip(x.split(2), lengths.split(2), strict=True))
    model, _ = nw.recalibrate(Padded().double(), batches, mode=mode)
    expect(model.bn, x, mask=mask)


def test_channel_dim_is_respected() -> None:
    x = torch.randn(6, 8, 5, dtype=torch.float64)
    model, _ = nw.recalibrate(nw.nn.BatchNorm(5, channel_dim=-1).double(), split(x, 4))
    expect(model, x, axis=2)


def test_a_fused_layer_is_checked_by_its_input() -> None:
    model, report = nw.recalibrate(nw.nn.BatchNorm1d(5, activation="relu").double(), ROWS)
    expect(model, ROWS)
    assert report.entries[0].facts["checked"] == "input"
    assert report.facts["self_consistent"]


class Mine(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    "make",
    [Mine, nn.SyncBatchNorm, nw.nn.BatchNorm1d, lambda c: nn.BatchNorm1d(c, affine=False)],
    ids=["subclass", "sync", "ours", "no-affine"],
)
@pytest.mark.parametrize("mode", ["batch", "exact"])
def test_relatives_of_batch_norm(make: Any, mode: str) -> None:
    model, _ = nw.recalibrate(make(5).double(), split(ROWS, 10), mode=mode)
    expect(model, ROWS)


@pytest.mark.parametrize("kind", [nn.LazyBatchNorm1d, nw.nn.LazyBatchNorm1d])
def test_lazy_norms(kind: Any) -> None:
    lazy = kind(dtype=torch.float64)
    with pytest.raises(InputError, match="lazy modules have their shapes"):
        nw.recalibrate(lazy, split(ROWS, 10))
    assert lazy.has_uninitialized_params()
    lazy(ROWS[:2])
    model, _ = nw.recalibrate(lazy, split(ROWS, 10))
    expect(model, ROWS)


def test_hooks_of_others_are_kept_and_seen() -> None:
    bn = nn.BatchNorm1d(5).double()
    bn.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model, _ = nw.recalibrate(bn, ROWS)
    expect(model, 2 * ROWS)
    assert len(model._forward_pre_hooks) == 1


def test_half_precision_buffers() -> None:
    model, report = nw.recalibrate(nn.BatchNorm1d(5).bfloat16(), ROWS.bfloat16())
    assert model.running_mean.dtype == torch.bfloat16
    assert report.facts["self_consistent"]


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, report = nw.recalibrate(chain(), split(IMAGES[:600].float(), 100))
    assert report.facts["self_consistent"]
    assert report["9"].facts["var_error"] < 0.03


def test_norms_that_are_left_say_why() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.BatchNorm1d(5)
            self.unused = nn.BatchNorm1d(5)
            self.stateless = nn.BatchNorm1d(5, track_running_stats=False)
            self.instance = nn.InstanceNorm1d(5, track_running_stats=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.instance(self.stateless(self.used(x))[:, :, None].expand(-1, -1, 3))
            return y

    model = Model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new, report = nw.recalibrate(model, ROWS.float(), mode="batch")
    assert {e.name: e.reason for e in report} == {
        "used": None,
        "unused": "never-called",
        "stateless": "no-running-statistics",
        "instance": "instance-norm",
    }
    changed = {k for k, v in new.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"used.running_mean", "used.running_var", "used.num_batches_tracked"}


@pytest.mark.parametrize(
    "choose",
    [
        lambda m: ["1", "4"],
        lambda m: ["[14]"],
        lambda m: [m[1], m[4]],
        lambda m: lambda name, module: isinstance(module, nn.BatchNorm2d),
    ],
    ids=["names", "pattern", "modules", "function"],
)
def test_layers_can_be_chosen(choose: Any) -> None:
    model = chain()
    new, report = nw.recalibrate(model, split(IMAGES.float(), 300), layers=choose(model))
    assert [e.name for e in report if e.action == "recalibrated"] == ["1", "4"]
    assert report["9"].reason == "not-selected"
    assert torch.equal(new[9].running_mean, model[9].running_mean)


# Calls


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(5).double()

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        z: Tensor = self.bn(x + scale * y)
        return z


@dataclass
class Fields:
    y: Tensor
    x: Tensor
    target: int = 0


class Output(OrderedDict):  # type: ignore[type-arg]
    """As transformers' ModelOutput: a mapping."""


@pytest.mark.parametrize(
    "pack",
    [
        lambda x: (x, 2 * x),
        lambda x: [x, 2 * x, CLASSES[: len(x)]],
        lambda x: {"x": x, "y": 2 * x, "labels": 0},
        lambda x: Fields(2 * x, x),
        lambda x: Output(x=x, y=2 * x),
    ],
    ids=["tuple", "list", "dict", "dataclass", "output"],
)
def test_batches_of_any_kind(pack: Any) -> None:
    model, _ = nw.recalibrate(Pair(), [pack(x) for x in split(ROWS, 10)])
    expect(model.bn, 3 * ROWS)


def test_a_target_is_not_an_optional_argument() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(5).double()

        def forward(self, x: Tensor, scale: Any = None) -> Tensor:
            assert scale is None
            y: Tensor = self.bn(x)
            return y

    model, _ = nw.recalibrate(Optional(), [(x, CLASSES[: len(x)]) for x in split(ROWS, 10)])
    expect(model.bn, ROWS)


def test_forward_says_how() -> None:
    model, _ = nw.recalibrate(
        nn.BatchNorm1d(5).double(), [("a", ROWS)], forward=lambda m, batch: m(batch[1])
    )
    expect(model, ROWS)


@pytest.mark.parametrize("data", [ROWS, {"input": ROWS}], ids=["tensor", "dict"])
def test_one_batch_as_data(data: Any) -> None:
    model, report = nw.recalibrate(nn.BatchNorm1d(5).double(), data)
    expect(model, ROWS)
    assert report.facts["batches"] == 1


def test_first_batches_only() -> None:
    model, _ = nw.recalibrate(nn.BatchNorm1d(5).double(), split(ROWS, 10), batches=2)
    expect(model, ROWS[:20])


def test_an_iterator_is_enough_for_one_pass() -> None:
    model, _ = nw.recalibrate(nn.BatchNorm1d(5).double(), iter(split(ROWS, 10)), mode="batch")
    expect(model, ROWS)


def test_wrapped_models_are_opened() -> None:
    bn = nn.BatchNorm1d(5).double()
    model, _ = nw.recalibrate(nn.DataParallel(bn), ROWS)
    expect(model, ROWS)


# What comes back


def test_the_model_given_stays_as_it_was() -> None:
    model = chain()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new, _ = nw.recalibrate(model, split(IMAGES.float(), 300))
    assert new is not model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_in_place_and_undo() -> None:
    model = chain()
    buffer, before = model[1].running_mean, {k: v.clone() for k, v in model.state_dict().items()}
    result = nw.recalibrate(model, split(IMAGES.float(), 300), inplace=True)
    assert result.model is model
    assert model[1].running_mean is buffer
    assert not torch.equal(buffer, before["1.running_mean"])
    assert result.undo() is model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("mode", ["batch", "exact"])
def test_modes_momentum_hooks_and_random_state_are_restored(mode: str) -> None:
    model = chain()
    model[1].momentum, model[4].momentum = None, 0.3
    model[4].eval()
    flags = [m.training for m in model.modules()]
    loader = DataLoader(TensorDataset(IMAGES.float()), batch_size=300, shuffle=True)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    new, _ = nw.recalibrate(model, loader, mode=mode)
    for m in (model, new):
        assert [n.training for n in m.modules()] == flags
        assert (m[1].momentum, m[4].momentum) == (None, 0.3)
        assert not any(n._forward_hooks or n._forward_pre_hooks for n in m.modules())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002


def test_the_number_of_batches_is_tracked() -> None:
    model, _ = nw.recalibrate(nn.BatchNorm1d(5).double(), split(ROWS, 10))
    assert int(model.num_batches_tracked) == 4


def test_drift_is_reported_before_and_after() -> None:
    bn = nn.BatchNorm1d(5).double()
    bn.running_mean.copy_(ROWS.mean(0) + 2 * ROWS.std(0))
    bn.running_var.copy_(ROWS.var(0) * 7)
    _, report = nw.recalibrate(bn, split(ROWS, 10))
    facts = report.entries[0].facts
    assert facts["shift_before"] == pytest.approx(2, rel=1e-5)
    assert facts["log_var_before"] == pytest.approx(np.log(7), rel=1e-5)
    assert abs(facts["shift_after"]) < 1e-12
    assert abs(facts["log_var_after"]) < 1e-12


def test_the_report_prints_its_check_and_is_json() -> None:
    _, report = nw.recalibrate(chain(), split(IMAGES.float(), 300))
    text = str(report)
    assert "3 recalibrated (mode 'exact', 4 passes over 6 batches)" in text
    assert "check holds" in text
    assert json.loads(json.dumps(report.to_dict()))["entries"][0]["values"] == 1797 * 16
    assert "check holds" in report._repr_html_()


@pytest.mark.parametrize("mode", ["batch", "exact"])
def test_the_metric_is_weighed_by_batch_size(mode: str) -> None:
    model = chain(torch.float64).eval()

    def metric(output: Tensor, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        loss = nn.functional.cross_entropy(output, batch[1])
        return {"loss": loss, "accuracy": (output.argmax(1) == batch[1]).double().mean()}

    batches = list(zip(IMAGES.split(700), CLASSES.split(700), strict=True))
    new, report = nw.recalibrate(model, batches, metric=metric, mode=mode)
    with torch.no_grad():
        for m, fact in ((model, "metric_before"), (new.eval(), "metric_after")):
            expected = metric(m(IMAGES), (IMAGES, CLASSES))
            for name, value in report.facts[fact].items():
                assert value == pytest.approx(float(expected[name]), rel=1e-9)
    assert "accuracy: " in str(report)


def test_random_augmentation_is_warned_of() -> None:
    def noisy(model: nn.Module, batch: Tensor) -> Any:
        return model(batch + torch.randn_like(batch))

    with pytest.warns(UserWarning, match="random augmentation"):
        _, report = nw.recalibrate(chain(), [IMAGES[:100].float()], forward=noisy)
    assert report.facts["self_consistent"] is False


@pytest.mark.parametrize("blend", [0.0, 0.25, 1.0])
def test_blending_with_the_source(blend: float) -> None:
    bn = nn.BatchNorm1d(5).double()
    bn.running_mean.fill_(2)
    bn.running_var.fill_(3)
    model, report = nw.recalibrate(bn, split(ROWS, 10), blend=blend)
    assert_close(model.running_mean, (1 - blend) * 2 + blend * ROWS.mean(0), rtol=1e-12, atol=0)
    assert_close(model.running_var, (1 - blend) * 3 + blend * ROWS.var(0), rtol=1e-12, atol=0)
    assert report.entries[0].action == ("blended" if blend < 1 else "recalibrated")


def test_progress_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        nw.recalibrate(nn.BatchNorm1d(5).double(), split(ROWS, 10))
        assert ("recalibrate" in stream.getvalue()) is shown


def test_the_example_repairs_a_model() -> None:
    path = Path(__file__).parent.parent / "examples" / "recalibrate.py"
    rows = runpy.run_path(str(path))["main"](["--steps", "100"])
    (_, dark_before), (_, dark_after) = rows["a darker domain"]
    assert dark_after > dark_before
    (poisoned_loss, _), (repaired_loss, _) = rows["poisoned by one batch"]
    assert np.isnan(poisoned_loss)
    assert repaired_loss < 0.3
