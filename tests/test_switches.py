"""What normalizes, what moves, and when: switches, contexts, domains."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normwise as nw
from normwise.errors import InputError, NonFiniteError

F64 = torch.float64
EXACT = {"rtol": 1e-11, "atol": 1e-11}
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "1d": (nw.nn.BatchNorm1d, {}),
    "any": (nw.nn.BatchNorm, {"momentum": None}),
    "sync": (nw.nn.SyncBatchNorm, {}),
    "ghost": (nw.nn.GhostBatchNorm, {"ghost_size": 3}),
    "renorm": (nw.nn.BatchRenorm, {"schedule": None}),
}


def layer_of(name: str, **options: Any) -> Any:
    cls, own = LAYERS[name]
    layer = cls(3, **own, **options, dtype=F64)
    with torch.no_grad():
        layer.weight.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in layer.named_buffers()}


def batch() -> Tensor:
    return torch.randn(7, 3, 4, dtype=F64) * 2 + 1


@pytest.mark.parametrize("update", [None, True, False])
@pytest.mark.parametrize("normalize", [None, "batch", "running"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_each_switch_decides_alone(
    name: str, training: bool, normalize: str | None, update: bool | None
) -> None:
    layer, x = layer_of(name), batch()
    twin = copy.deepcopy(layer)
    by_batch, moved = twin.train()(x), buffers(twin)
    twin.load_state_dict(layer.state_dict())
    by_running, still = twin.eval()(x), buffers(twin)
    layer.normalize_with, layer.update_stats = normalize, update
    layer.train(not training)
    layer.train(training)  # survives both
    x.requires_grad_()
    y = layer(x)
    y.backward(torch.randn_like(y))
    expect_batch = training if normalize is None else normalize == "batch"
    expect_moved = training if update is None else update
    assert_close(y, by_batch if expect_batch else by_running, **EXACT)
    assert_close(buffers(layer), moved if expect_moved else still, **EXACT)


def test_switches_are_arguments_too_and_show() -> None:
    layer = nw.nn.BatchNorm2d(3, normalize_with="running", update_stats=True)
    assert "normalize_with='running', update_stats=True" in repr(layer)
    twin = pickle.loads(pickle.dumps(layer))
    assert (twin.normalize_with, twin.update_stats) == ("running", True)
    lazy = nw.nn.LazyBatchNorm1d(update_stats=False)
    lazy(torch.randn(4, 3))
    assert lazy.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "value"), [("normalize_with", "eval"), ("update_stats", 1), ("normalize_with", True)]
)
def test_a_switch_that_is_none_of_its_positions(name: str, value: Any) -> None:
    layer = nw.nn.BatchNorm1d(3)
    with pytest.raises(InputError, match=f"{name} is a switch"):
        setattr(layer, name, value)


def test_running_without_running_statistics_is_an_error() -> None:
    layer = nw.nn.BatchNorm1d(3, track_running_stats=False, normalize_with="running")
    with pytest.raises(InputError, match="running statistics normalize"):
        layer(torch.randn(4, 3))


def test_a_guard_works_behind_a_switch() -> None:
    layer = nw.nn.BatchNorm1d(3, nonfinite="raise", normalize_with="running")
    x = torch.full((4, 3), torch.inf)
    with pytest.raises(NonFiniteError, match="BatchNorm1d"):
        layer(x)
    assert (layer.running_mean == 0).all()


@pytest.mark.parametrize("name", LAYERS)
def test_held_statistics_do_not_move(name: str) -> None:
    layer, x = layer_of(name), batch()
    before, expected = buffers(layer), copy.deepcopy(layer)(x)
    with nw.hold_statistics():
        assert_close(layer(x), expected, **EXACT)
    assert_close(buffers(layer), before, rtol=0, atol=0)
    layer(x)
    assert layer.num_batches_tracked == 1


def test_contexts_are_of_their_thread_and_end_with_an_exception() -> None:
    layer = nw.nn.BatchNorm1d(3)
    with nw.hold_statistics():
        other = threading.Thread(target=layer, args=(torch.randn(4, 3),))
        other.start()
        other.join()
    assert layer.num_batches_tracked == 1
    with pytest.raises(ZeroDivisionError), nw.hold_statistics():
        raise ZeroDivisionError
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("name", LAYERS)
def test_checkpointing_moves_statistics_once(name: str) -> None:
    layer, x = layer_of(name), batch().requires_grad_()
    twin, dy = copy.deepcopy(layer), torch.randn_like(x)
    twin(x).backward(dy)
    expected, x.grad = x.grad, None
    y = checkpoint(layer, x, use_reentrant=False, context_fn=nw.checkpoint_contexts)
    y.backward(dy)
    assert_close(buffers(layer), buffers(twin), **EXACT)
    # The second forward meets the statistics that the first one met: renorm depends on them.
    assert_close(x.grad, expected, **EXACT)
    assert_close(layer.weight.grad, twin.weight.grad, **EXACT)


def test_a_checkpointed_region_calls_a_layer_twice_and_is_run_thrice() -> None:
    layer, x = layer_of("renorm"), batch().requires_grad_()
    twin, dy = copy.deepcopy(layer), torch.randn_like(x)
    expected = torch.autograd.grad(twin(twin(x).sin()), x, dy)[0]
    y = checkpoint(
        lambda x: layer(layer(x).sin()), x, use_reentrant=False, context_fn=nw.checkpoint_contexts
    )
    for keep in (True, False):
        assert_close(torch.autograd.grad(y, x, dy, retain_graph=keep)[0], expected, **EXACT)
    assert layer.num_batches_tracked == 2


# Micro-batches


@pytest.mark.parametrize("name", LAYERS)
def test_micro_batches_move_the_statistics_once_as_one_batch(name: str) -> None:
    layer, x = layer_of(name), torch.randn(14, 3, 4, dtype=F64) + 5
    whole = layer_of("any") if name == "any" else layer_of("1d")
    whole.load_state_dict(layer.state_dict())
    for _ in range(2):
        with nw.accumulate_statistics():
            for part in x.split([6, 5, 3]):
                before, expected = buffers(layer), copy.deepcopy(layer)
                with nw.hold_statistics():
                    y = expected(part)
                assert_close(layer(part), y, **EXACT)
                assert_close(buffers(layer), before, rtol=0, atol=0)
        whole(x)
    assert_close(buffers(layer), buffers(whole), **EXACT)


def test_masked_micro_batches_count_what_is_valid() -> None:
    layer, whole = nw.nn.BatchNorm1d(3, dtype=F64), nw.nn.BatchNorm1d(3, dtype=F64)
    x = torch.randn(6, 3, 5, dtype=F64)
    lengths = torch.tensor([5, 1, 0, 0, 3, 2])
    with nw.accumulate_statistics():
        for part, own in zip(x.split(2), lengths.split(2), strict=True):
            layer(part, lengths=own)
    whole(x, lengths=lengths)
    assert_close(buffers(layer), buffers(whole), **EXACT)


def test_nothing_moves_after_an_exception() -> None:
    layer = nw.nn.BatchNorm1d(3)

    @nw.accumulate_statistics()
    def step() -> None:
        layer(torch.randn(4, 3))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert layer.num_batches_tracked == 0


# Domains


@pytest.mark.parametrize("name", LAYERS)
def test_a_domain_has_statistics_of_its_own(name: str) -> None:
    layer = layer_of(name, domains=["night"])
    plain, x = copy.deepcopy(layer), batch()
    main = {k: v for k, v in buffers(layer).items() if not k.startswith("domains")}
    own = layer.domains["night"]
    # The set began as a copy, before this test wrote to the layer's.
    assert (own.running_mean == 0).all()
    own.load_state_dict({k: main[k] for k in own.state_dict()})
    with nw.domain("night"):
        y = layer(x)
        still = layer.eval()(x)
    layer.train()
    assert_close(y, plain(x), **EXACT)
    assert_close({k: layer.state_dict()[k] for k in main}, main, rtol=0, atol=0)
    moved = {k: plain.state_dict()[k] for k in main}
    assert_close(dict(own.state_dict()), moved, **EXACT)
    assert_close(still, plain.eval()(x), **EXACT)


def test_domains_in_the_state_dict_and_back() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nw.nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model(torch.randn(8, 4))
    assert nw.nn.add_domains(model, ["day", "night"]) == 1
    assert torch.equal(model[1].domains["day"].running_mean, model[1].running_mean)
    keys = [k for k in model.state_dict() if "night" in k]
    assert keys == [
        f"1.domains.night.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")
    ]
    twin = nn.Sequential(
        nn.Linear(4, 3), nw.nn.BatchNorm1d(3, domains=["day", "night"]), nn.BatchNorm1d(3)
    )
    twin.load_state_dict(model.state_dict())
    with nw.domain("night"):
        twin(torch.randn(8, 4))
    assert twin[1].domains["night"].num_batches_tracked == 2
    assert twin[1].domains["day"].num_batches_tracked == 1
    assert twin[1].num_batches_tracked == 1


def test_domains_nest_and_leave_others_alone() -> None:
    layer = nw.nn.BatchNorm1d(3, domains=["day", "night"])
    without = nw.nn.BatchNorm1d(3)
    x = torch.randn(8, 3)
    with nw.domain("day"):
        with nw.domain(None):
            layer(x)
        with nw.domain("night"):
            layer(x)
        layer(without(x))
    counts = [layer.num_batches_tracked, *(d.num_batches_tracked for d in layer.domains.values())]
    assert [int(c) for c in counts] == [1, 1, 1]
    assert without.num_batches_tracked == 1


def test_wrong_domains() -> None:
    layer = nw.nn.BatchNorm1d(3, domains=["day"])
    with pytest.raises(InputError, match=r"'dusk' and a layer with 'day'"), nw.domain("dusk"):
        layer(torch.randn(4, 3))
    for name in ("", "a.b", "day", "keys"):
        with pytest.raises(InputError, match="name of its own"):
            layer.add_domains(name)
    with pytest.raises(InputError, match="track_running_stats=True"):
        nw.nn.BatchNorm1d(3, track_running_stats=False, domains=["day"])
    with pytest.raises(InputError, match="a domain has a name"):
        nw.domain("")


def test_micro_batches_of_two_domains() -> None:
    layer = nw.nn.BatchNorm1d(3, domains=["night"], dtype=F64)
    whole, x = nw.nn.BatchNorm1d(3, dtype=F64), torch.randn(8, 3, dtype=F64)
    with nw.accumulate_statistics():
        layer(x + 9)
        with nw.domain("night"):
            for part in x.split(4):
                layer(part)
    whole(x)
    assert_close(layer.domains["night"].running_var, whole.running_var, **EXACT)
    assert layer.num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_contexts_around_compiled_calls() -> None:
    layer = nw.nn.BatchNorm1d(3, domains=["night"])
    call = torch.compile(layer, backend="aot_eager")
    x = torch.randn(8, 3)
    call(x)
    with nw.hold_statistics():
        call(x)
    with nw.domain("night"):
        call(x)
    layer.update_stats = False
    call(x)
    assert layer.num_batches_tracked == 1
    assert layer.domains["night"].num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("normalize", ["batch", "running"])
def test_switches_compile_in_one_graph(normalize: str) -> None:
    layer = nw.nn.BatchNorm1d(3, normalize_with=normalize, update_stats=True, dtype=F64)
    twin, x = copy.deepcopy(layer), torch.randn(8, 3, dtype=F64)
    y = torch.compile(twin, backend="aot_eager", fullgraph=True)(x)
    assert_close(y, layer(x), **EXACT)
    assert_close(buffers(twin), buffers(layer), **EXACT)
