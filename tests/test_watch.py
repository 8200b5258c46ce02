"""``watch``: what it measures, when, and that the training does not notice."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise.errors import InputError
from normwise.tools.watch.measure import spread
from normwise.tools.watch.record import WatchRecord
from normwise.tools.watch.watcher import CALLS


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    """Thousands of tiny operations: a second thread only waits for its core."""
    torch.set_num_threads(1)


def small(norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), norm(6), nn.ReLU(), nn.Linear(6, 3), norm(3))


def train(model: nn.Module, steps: int = 3, batch: int = 16, lr: float = 0.1) -> list[Tensor]:
    """Losses of a training whose batches, dropout and cotangents are drawn from the seed."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    losses = []
    for _ in range(steps):
        x, target = torch.randn(batch, 4), torch.randn(batch, 3)
        optimizer.zero_grad()
        loss = (model(x) * target).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def steps_of(record: WatchRecord, name: str = "1", **where: Any) -> list[int]:
    return record.series(name, **where)[0]


# What is measured


def test_figures_of_a_call_are_those_of_numpy() -> None:
    model, x = small(), torch.randn(50, 4) * 3 + 1e3
    seen: dict[str, Any] = {}
    model[1].register_forward_hook(lambda m, a, y: seen.update(x=a[0], y=y))
    model[1].running_mean.normal_()
    mean, var = (b.double().numpy().copy() for b in (model[1].running_mean, model[1].running_var))
    cotangent = torch.randn(50, 3)
    with nw.watch(model, every=1) as record:
        y = model(x)
        seen["x"].retain_grad()
        (y * cotangent).sum().backward()
    row = record.rows[0]
    given, made = (seen[k].detach().double().numpy() for k in "xy")
    for what, values in (("input", given), ("output", made)):
        expected = np.percentile(values, [1, 15, 50, 85, 99])
        found = [row[f"{what}_p{p}"] for p in (1, 15, 50, 85, 99)]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    spread_ = np.sqrt(given.var(0, ddof=1) + 1e-5)
    shift = np.abs(mean - given.mean(0)) / spread_
    log_var = np.log((var + 1e-5) / spread_**2)
    assert row["shift"] == pytest.approx(shift.max(), rel=1e-6)
    assert row["log_var"] == pytest.approx(log_var[np.abs(log_var).argmax()], rel=1e-6)
    assert row["log_var_median"] == pytest.approx(np.sort(np.abs(log_var))[2], rel=1e-6)
    gradients = (model[1].weight.grad, model[1].bias.grad, seen["x"].grad)
    for name, gradient in zip(("gamma_grad", "beta_grad", "input_grad"), gradients, strict=True):
        assert row[name] == pytest.approx(float(np.linalg.norm(gradient.double())), rel=1e-6)
    assert (row["values"], row["nonfinite"], row["nonfinite_grads"]) == (300, 0, 0)


@pytest.mark.parametrize(
    ("layer", "shape", "remembers"),
    [
        (nn.BatchNorm2d(4), (5, 4, 3, 3), True),
        (nn.BatchNorm1d(4, track_running_stats=False), (5, 4), False),
        (nn.GroupNorm(2, 4), (5, 4, 3), False),
        (nn.LayerNorm(4), (5, 4), False),
        (nn.RMSNorm(4), (5, 4), False),
        (nn.InstanceNorm1d(4), (5, 4, 3), False),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (5, 4, 3), True),
        (nn.InstanceNorm1d(4, track_running_stats=True), (4, 3), True),
        (nw.nn.BatchNorm(4, channel_dim=-1, activation="relu"), (5, 3, 4), True),
        (nw.nn.BatchNorm1d(4, domains=["night"]), (5, 4), True),
        (nw.nn.GhostBatchNorm(4, ghost_size=2), (6, 4), True),
        (nw.nn.BatchRenorm(4), (6, 4), True),
        (nw.nn.FrozenBatchNorm(4), (6, 4), True),
        (nw.nn.SyncBatchNorm(4), (6, 4), True),
        (nw.nn.GroupNorm(2, 4, channel_dim=-1), (5, 3, 4), False),
        (nw.nn.LayerNorm(4, activation="silu"), (5, 4), False),
        (nw.nn.RMSNorm(4), (5, 4), False),
        (nw.nn.InstanceNorm2d(4, track_running_stats=True), (5, 4, 3, 3), True),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_every_kind_is_measured(layer: nn.Module, shape: tuple[int, ...], remembers: bool) -> None:
    layer = copy.deepcopy(layer)
    with nw.watch(layer, every=1) as record:
        y = layer(torch.randn(shape, requires_grad=True))
        (y * torch.randn(y.shape)).sum().backward()
    (row,) = record.rows
    assert row["input_p1"] < row["input_p99"]
    assert row["output_p1"] < row["output_p99"]
    assert row["input_grad"] > 0
    assert (row["shift"] is not None) == remembers
    trained = getattr(layer, "weight", None)
    assert (row["gamma_grad"] is not None) == isinstance(trained, nn.Parameter)


def test_lazy_norms_are_measured_once_they_have_shapes() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LazyBatchNorm1d())
    with nw.watch(model, every=1) as record:
        model(torch.randn(8, 4)).square().mean().backward()
    (row,) = record.rows
    assert (row["kind"], row["values"]) == ("BatchNorm1d", 48)
    assert row["shift"] > 0


def test_instance_norms_remember_means_over_samples() -> None:
    layer, x = nn.InstanceNorm1d(3, track_running_stats=True), torch.randn(4, 3, 20)
    with nw.watch(layer, every=1) as record:
        layer(x)
    s2 = x.double().numpy().var(2, ddof=1).mean(0)
    shift = np.abs(x.double().numpy().mean((0, 2))) / np.sqrt(s2 + 1e-5)
    assert record.rows[0]["shift"] == pytest.approx(shift.max(), rel=1e-6)
    assert record.rows[0]["log_var_median"] == pytest.approx(
        np.median(np.abs(np.log(s2))), rel=1e-3
    )


def test_statistics_far_from_zero_are_exact() -> None:
    layer = nw.nn.BatchNorm1d(3, dtype=torch.float64)
    layer.running_mean.fill_(1e6)
    x = torch.randn(64, 3, dtype=torch.float64) + 1e6
    with nw.watch(layer, every=1) as record:
        layer(x)
    s = x.numpy().std(0, ddof=1)
    assert record.rows[0]["shift"] == pytest.approx((abs(x.numpy().mean(0) - 1e6) / s).max(), 1e-4)


@pytest.mark.parametrize("how", ["mask", "lengths"])
def test_padding_is_left_out(how: str) -> None:
    layer, x = nw.nn.BatchNorm1d(3), torch.randn(4, 3, 5)
    lengths = torch.tensor([5, 2, 3, 1])
    kept = (torch.arange(5) < lengths[:, None]).unsqueeze(1)
    x = torch.where(kept, x, torch.nan)
    given: dict[str, Any] = {"mask": kept} if how == "mask" else {"lengths": lengths}
    with nw.watch(layer, every=1) as record:
        layer(x, **given)
    (row,) = record.rows
    valid = x.movedim(1, 2)[kept.squeeze(1)].numpy()
    assert row["nonfinite"] == 0
    assert row["input_p50"] == pytest.approx(float(np.median(valid)), rel=1e-6)
    shift = np.abs(valid.mean(0)) / np.sqrt(valid.var(0, ddof=1) + 1e-5)
    assert row["shift"] == pytest.approx(shift.max(), rel=1e-5)


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    layer, x = nn.LayerNorm(100), torch.linspace(0, 1, 100).repeat(3, 1)
    x[0, :5], x[2, 7] = torch.inf, torch.nan
    with nw.watch(layer, every=1) as record:
        layer(x.requires_grad_()).square().mean().backward()
    (row,) = record.rows
    assert (row["nonfinite"], row["nonfinite_grads"]) == (6, 3)
    assert 0 <= row["input_p1"] < row["input_p99"] <= 1
    assert record.to_dict()["rows"]["input_grad"] == [None]


def test_finite_values_whose_sum_overflows_are_not_counted() -> None:
    layer = nn.LayerNorm(4, dtype=torch.float64)
    with nw.watch(layer, every=1) as record:
        layer(torch.full((3, 4), 1e308, dtype=torch.float64))
    assert record.rows[0]["nonfinite"] == 0


def test_empty_batches_have_rows_without_figures() -> None:
    layer = nw.nn.BatchNorm1d(3)
    with nw.watch(layer, every=1) as record:
        layer(torch.zeros(0, 3))
    (row,) = record.rows
    assert (row["values"], row["nonfinite"], row["input_p50"], row["shift"]) == (0, 0, None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer = nw.nn.BatchNorm1d(3)
    x = (torch.randn(40, 3) * 100).to(dtype).requires_grad_()
    with nw.watch(layer, every=1) as record:
        y = layer(x)
        (y * torch.full_like(y, 2000) * torch.randn(40, 3).to(dtype)).sum().backward()
    row = record.rows[0]
    assert row["input_p50"] == pytest.approx(float(np.median(x.detach().double())), rel=1e-6)
    assert math.isfinite(row["gamma_grad"])
    assert row["gamma_grad"] > 0


@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "transposed", "sliced", "expanded"]
)
def test_samples_are_spread_over_every_layout(layout: str) -> None:
    """Of 64 channels of constants each is met alike: every 64th value would be one channel's."""
    x = torch.arange(64.0).reshape(1, 64, 1, 1).repeat(8, 1, 8, 8)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(0, 3).contiguous().transpose(0, 3)
    elif layout == "sliced":
        x = torch.stack([x, x * torch.nan], -1)[..., 0]
    elif layout == "expanded":
        x = torch.arange(64.0).reshape(1, 64, 1, 1).expand(8, 64, 8, 8)
    sample = spread(x, 1024)
    counts = torch.bincount(sample.long(), minlength=64)
    assert 700 < len(sample) <= 1024
    assert counts.max() - counts.min() <= 3


# When


def test_every_kth_step() -> None:
    with nw.watch(model := small(), every=3) as record:
        train(model, 8)
    assert steps_of(record) == [0, 3, 6]
    assert record.steps == record.facts["steps"] == 8
    assert all(g is not None for g in record.series("1", "gamma_grad")[1])


def test_a_run_that_goes_on_numbers_its_steps_from_start() -> None:
    with nw.watch(model := small(), every=2, start=7) as record:
        train(model, 4)
    assert steps_of(record) == [7, 9]


def test_forwards_in_eval_mode_are_marked_and_not_counted() -> None:
    model = small()
    with nw.watch(model, every=4) as record:
        train(model, 5)
        model.eval()
        with torch.no_grad():
            for _ in range(6):
                model(torch.randn(8, 4))
        model.train()
        train(model, 1)
    assert steps_of(record) == [0, 4]
    assert steps_of(record, mode="eval") == [5, 5]  # the first, and the fourth after it
    assert (record.steps, record.eval_passes) == (6, 6)
    (_, training) = record.series("1", "training", mode="eval")
    assert training == [False, False]


def test_a_frozen_norm_in_training() -> None:
    model = small()
    model[1].eval()
    with nw.watch(model, every=1) as record:
        train(model, 1)
    assert record.series("1", "training")[1] == [False]


def test_a_shared_norm_has_a_row_for_each_call() -> None:
    norm = nw.nn.BatchNorm1d(4)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm, nn.Linear(4, 3))
    with nw.watch(model, every=1) as record:
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
    calls = [(r["step"], r["call"], r["name"]) for r in record.rows]
    assert calls == [(0, 0, "0"), (0, 1, "0"), (1, 0, "0"), (1, 1, "0")]
    assert record["0"].facts["calls"] == 2
    first, second = record.rows[2:]
    assert first["gamma_grad"] == pytest.approx(float(norm.weight.grad.norm()), rel=1e-6)
    assert second["gamma_grad"] is None
    assert second["input_grad"] > 0


def test_of_many_calls_the_first_have_rows() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(CALLS + 5):
                x = self.norm(x)
            return x

    with nw.watch(model := Recurrent(), every=1) as record:
        model(torch.randn(3, 4))
    assert len(record.rows) == CALLS


def test_parts_of_a_container_make_steps_too() -> None:
    model = nn.ModuleList([nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.BatchNorm1d(3)])
    with nw.watch(model, every=2) as record:
        for _ in range(5):
            x = torch.randn(8, 4)
            for part in model:
                x = part(x)
            x.square().mean().backward()
    assert steps_of(record) == steps_of(record, "3") == [0, 2, 4]
    assert record.series("3", "gamma_grad")[1][-1] > 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_repeated_forwards_of_checkpointing_do_not_count(reentrant: bool, whole: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = small(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=reentrant))

    model = small() if whole else Checkpointed()
    with nw.watch(model, every=1) as record:
        for _ in range(3):
            x = torch.randn(8, 4, requires_grad=True)
            y = checkpoint(model, x, use_reentrant=reentrant) if whole else model(x)
            y.square().mean().backward()
    name = "1" if whole else "body.1"
    assert steps_of(record, name) == [0, 1, 2]
    assert record.steps == 3
    assert all(call == 0 for call in record.data()["call"])


def test_gradients_of_a_later_backward_still_arrive() -> None:
    """Two micro-batches, one backward: the first forward's row waits for it."""
    model = small()
    with nw.watch(model, every=10) as record:
        (model(torch.randn(8, 4)) + model(torch.randn(8, 4))).square().mean().backward()
    assert record.rows[0]["gamma_grad"] > 0


def test_gradients_are_those_of_the_first_backward() -> None:
    model, x = small(nn.LayerNorm), torch.randn(8, 4, requires_grad=True)
    with nw.watch(model, every=1) as record:
        y = model(x)
        y.square().mean().backward(retain_graph=True)
        first = float(model[1].weight.grad.norm())
        (y.square().mean() * 10).backward()
    assert record.rows[0]["gamma_grad"] == pytest.approx(first, rel=1e-5)


def test_a_forward_without_backward_has_no_gradients() -> None:
    with nw.watch(model := small(), every=1) as record, torch.no_grad():
        model(torch.randn(8, 4))
    assert record.rows[0]["gamma_grad"] is None
    assert record.rows[0]["output_p50"] is not None


# That nobody notices


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 6), nw.nn.BatchNorm1d(6, activation="relu"), nn.Dropout(0.5),
            nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.ReLU(inplace=True),
            nn.Linear(8, 3), nn.BatchNorm1d(3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("saver", [False, True])
def test_training_is_the_same_bit_for_bit(saver: bool) -> None:
    plain, watched = Noisy(), Noisy()
    watched.load_state_dict(plain.state_dict())
    before = train(plain, 6)
    state = torch.get_rng_state()
    with nw.watch(watched, every=2):
        if saver:
            with nw.memory_saver():
                after = train(watched, 6)
        else:
            after = train(watched, 6)
    assert torch.equal(torch.stack(before), torch.stack(after))
    assert torch.equal(state, torch.get_rng_state())
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("context", ["autocast", "inference"])
def test_outputs_are_the_same_bit_for_bit_in_a_context(context: str) -> None:
    plain, watched = small(nw.nn.BatchNorm1d), small(nw.nn.BatchNorm1d)
    watched.load_state_dict(plain.state_dict())
    x = torch.randn(16, 4)

    def around() -> Any:
        if context == "autocast":
            return torch.autocast("cpu", torch.bfloat16)
        return torch.inference_mode()

    with around():
        expected = [plain(x) for _ in range(3)]
    with nw.watch(watched, every=1) as record, around():
        found = [watched(x) for _ in range(3)]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert steps_of(record) == [0, 1, 2]
    assert all(s > 0 for s in record.series("4", "shift")[1])


def hooks(model: nn.Module) -> int:
    tensors = [t for p in model.parameters() for t in (p._backward_hooks or ())]
    return len(tensors) + sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called)
        + len(m._forward_pre_hooks_with_kwargs) + len(m._forward_hooks_with_kwargs)
        for m in model.modules()
    )  # fmt: skip


def test_hooks_are_gone_afterwards() -> None:
    model = small()
    with nw.watch(model, every=1):
        train(model, 2)
        assert hooks(model) > 0
    assert hooks(model) == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_error_within_a_forward(error: type[BaseException]) -> None:
    model = small()

    def fail(*_: Any) -> None:
        raise error("on purpose")

    handle = model[3].register_forward_hook(fail)
    with pytest.raises(error, match="on purpose"), nw.watch(model, every=1) as record:
        model(torch.randn(8, 4))
    handle.remove()
    assert hooks(model) == 0
    assert [row["name"] for row in record.rows] == ["1"]


def test_a_forward_that_failed_does_not_disturb_the_next() -> None:
    model = small()
    with nw.watch(model, every=1) as record:
        with pytest.raises(RuntimeError):
            model(torch.randn(8, 5))
        with pytest.raises(ValueError, match="more than 1 value"):
            model(torch.randn(1, 4))
        train(model, 2)
    assert steps_of(record, "4") == [2, 3]
    assert all(row["output_p50"] is not None for row in record.rows)


def test_between_measured_steps_norms_have_no_hooks() -> None:
    model = small()
    with nw.watch(model, every=5):
        train(model, 2)
        assert hooks(model[1]) == 0


def test_blocks_within_one_another_are_independent() -> None:
    model = small()
    with nw.watch(model, every=1, layers="1") as outer:
        train(model, 1)
        with nw.watch(model, every=2) as inner:
            train(model, 3)
        train(model, 1)
    assert steps_of(outer) == [0, 1, 2, 3, 4]
    assert steps_of(inner) == steps_of(inner, "4") == [0, 2]
    assert [e.name for e in outer] == ["1"]
    assert hooks(model) == 0


def test_a_distributed_model(tmp_path: Any) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(small())
        with nw.watch(model, every=2) as record:
            train(model, 3)
    finally:
        torch.distributed.destroy_process_group()
    assert steps_of(record) == [0, 2]
    assert record.rows[0]["beta_grad"] > 0


def test_a_compiled_model_stays_as_compiled() -> None:
    """Compiled norms run no hooks; an eager one beside the compiled part is seen."""
    torch._dynamo.reset()
    count = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    inner, norm = small(), nn.BatchNorm1d(3)
    model = nn.Sequential(torch.compile(inner, backend=backend, fullgraph=True), norm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        train(model, 2)
        compiled = count
        with nw.watch(model, every=1) as record:
            train(model, 3)
        train(model, 1)
        assert count == compiled
        torch._dynamo.reset()
        with nw.watch(whole := torch.compile(small(), backend=backend, fullgraph=True)) as seen:
            train(whole, 3)
    assert {row["name"] for row in record.rows} == {"1"}
    assert seen.steps == 3
    assert "no call" in str(seen)
    torch._dynamo.reset()


def test_transforms_are_left_alone() -> None:
    model = small(nn.LayerNorm)
    x = torch.randn(5, 8, 4)
    expected = torch.stack([model(one) for one in x])
    with nw.watch(model, every=1) as record:
        y = torch.func.vmap(model)(x)
    torch.testing.assert_close(y, expected)
    assert record.rows == ()


def test_copies_and_state_of_a_watched_model() -> None:
    model = small()
    keys = list(model.state_dict())
    with nw.watch(model, every=1):
        train(model, 1)
        assert list(model.state_dict()) == keys
    clone = copy.deepcopy(model)
    assert torch.equal(clone(torch.ones(4, 4)), model(torch.ones(4, 4)))


# What it refuses


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0}, {"every": 2.5}, {"values": 3}, {"keep": 1}, {"start": -1},
        {"percentiles": ()}, {"percentiles": (50, 15)}, {"percentiles": (0, 101)},
        {"layers": "nothing.*"}, {"path": "watch.csv"}, {"tensorboard": 3},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range(options: dict[str, Any]) -> None:
    model = small()
    with pytest.raises(InputError), nw.watch(model, **options):
        pass
    assert hooks(model) == 0


def test_a_model_without_norms() -> None:
    with pytest.raises(InputError, match="no norms"), nw.watch(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("layers", ["4", ["4"], lambda n, m: n == "4"])
def test_layers_are_chosen(layers: Any) -> None:
    with nw.watch(model := small(), every=1, layers=layers) as record:
        train(model, 1)
    assert [row["name"] for row in record.rows] == ["4"]


def test_running_statistics_alone_make_a_norm() -> None:
    """Frozen ones of other libraries, by their buffers; a domain's statistics are no norm."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(4))
            self.register_buffer("running_var", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * 1.0

    model = nn.Sequential(Frozen(), nw.nn.BatchNorm1d(4, domains=["a"]))
    with nw.watch(model, every=1) as record:
        model(torch.randn(8, 4))
    assert [e.name for e in record] == ["0", "1"]
