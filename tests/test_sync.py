"""Synchronised batch norm on gloo ranks equals one process on the concatenated batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import sync_worker
import torch
from cases import array
from sync_worker import CASES, F64
from torch import Tensor, nn
from torch.testing import assert_close

import normwise as nw

WORKER = Path(sync_worker.__file__)
EXACT = {"rtol": 1e-10, "atol": 1e-10}
Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank found: all jobs in one start of the processes, which costs seconds."""
    directory = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(request.param), str(directory)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(request.param)
    ]
    logs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(logs)
    return [torch.load(directory / f"{rank}.pt") for rank in range(request.param)]


def whole(results: Results, job: str, name: str | None, key: str) -> Tensor:
    """A batch-like result of all ranks, concatenated."""
    parts = [r[job] if name is None else r[job][name] for r in results]
    return torch.cat([p[key] for p in parts])


def problem(name: str, ranks: int) -> tuple[dict[str, Any], oracle.BatchNorm]:
    data = sync_worker.draw(name, ranks)
    options = CASES[name][2]
    affine = options.get("affine", True)
    call = oracle.BatchNorm(
        array(data["x"]),
        array(data["weight"]) if affine else None,
        array(data["bias"]) if affine and options.get("bias", True) else None,
        array(data["residual"]),
        None if data["mask"] is None else data["mask"].numpy(),
        options.get("channel_dim", 1) % data["x"].dim(),
        activation=options.get("activation") or "none",
    )
    return data, call


def assert_near(actual: Tensor | None, expected: Any, scale: float = 1.0) -> None:
    assert actual is not None
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_whole_batch(ranks: Results, name: str) -> None:
    _, call = problem(name, len(ranks))
    # 1e6 standard deviations of offset leave 1e-10 of a float64's 1e-16.
    scale = max(1.0, CASES[name][3].get("offset", 1.0))
    assert_near(whole(ranks, "cases", name, "y"), call.forward(), scale)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_whole_batch(ranks: Results, name: str) -> None:
    data, call = problem(name, len(ranks))
    expected = call.gradients(array(data["dy"]))
    scale = max(1.0, CASES[name][3].get("offset", 1.0))
    assert_near(whole(ranks, "cases", name, "dx"), expected.dx, scale)
    if data["residual"] is not None:
        assert_near(whole(ranks, "cases", name, "dresidual"), expected.dresidual)
    # A rank has its share of a parameter's gradient.
    shares = [r["cases"][name] for r in ranks]
    for key, value in (("dweight", expected.dweight), ("dbias", expected.dbias)):
        if key in shares[0]:
            assert_near(sum(share[key] for share in shares), value, scale)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_keeps_the_running_statistics_of_the_whole_batch(
    ranks: Results, name: str
) -> None:
    data, call = problem(name, len(ranks))
    options = CASES[name][2]
    if not options.get("track_running_stats", True):
        assert "running_mean" not in ranks[0]["cases"][name]
        return
    channels = len(data["weight"])
    moments = oracle.moments(call.x, call.axis, call.mask)
    mean, var, tracked = oracle.update_running(
        np.zeros(channels), np.ones(channels), 0, moments, options.get("momentum", 0.1)
    )
    for result in ranks:
        own = result["cases"][name]
        assert_near(own["running_mean"], mean)
        assert_near(own["running_var"], var)
        assert own["num_batches_tracked"] == tracked


def test_all_masked_yields_zeros_and_no_nan(ranks: Results) -> None:
    for key in ("y", "dx"):
        assert (whole(ranks, "cases", "all masked", key) == 0).all()
    assert all(r["cases"]["all masked"]["num_batches_tracked"] == 0 for r in ranks)


def test_2c_plus_1_numbers_forward_and_2c_backward(ranks: Results) -> None:
    channels = CASES["unequal"][1][0]
    expected = [
        ("gather", 2 * channels + 1, "torch.float64"),
        ("all_reduce", 2 * channels, "torch.float64"),
    ]
    assert [r["wire"]["seen"] for r in ranks] == [expected] * len(ranks)


def test_half_precision_loses_the_rounding_of_the_output_alone(ranks: Results) -> None:
    data, _ = problem("unequal", len(ranks))
    rounded = data["x"].bfloat16().double()
    exact = nn.functional.batch_norm(
        rounded, None, None, data["weight"].float().double(), data["bias"].float().double(), True
    )
    y = whole(ranks, "half", None, "y")
    assert y.dtype == torch.bfloat16
    assert_close(y.double(), exact, rtol=2.0**-8, atol=1e-6)
    variance = 0.9 + 0.1 * rounded.var((0, 2, 3))
    assert_close(ranks[0]["half"]["running_var"].double(), variance, rtol=1e-6, atol=1e-6)


def test_second_derivatives_go_through_the_collectives(ranks: Results) -> None:
    data, _ = problem("residual", len(ranks))
    first = problem("unequal", len(ranks))[0]
    layer = nw.nn.BatchNorm(4, dtype=F64)
    layer.load_state_dict(layer.state_dict() | {k: first[k] for k in ("weight", "bias")})
    x = data["x"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).sin(), x, data["dy"], create_graph=True)
    slope.cos().sum().backward()
    assert_near(whole(ranks, "second", None, "dx"), x.grad)
    assert_near(sum(r["second"]["dweight"] for r in ranks), layer.weight.grad)


def test_two_forward_passes_before_the_backward_under_ddp(ranks: Results) -> None:
    data, _ = problem("unequal", len(ranks))
    layer = nw.nn.BatchNorm2d(4, dtype=F64)
    layer.load_state_dict(layer.state_dict() | {k: data[k] for k in ("weight", "bias")})
    y = layer(data["x"]) + layer(2 * data["x"])
    y.backward(data["dy"])
    assert_near(whole(ranks, "parallel", None, "y"), y.detach())
    for result in ranks:  # DDP gives each rank the mean of the shares
        assert_near(result["parallel"]["dweight"], layer.weight.grad / len(ranks))
        assert_near(result["parallel"]["mean"], layer.running_mean)


def test_accumulated_and_switched_statistics_are_merged_over_the_ranks(ranks: Results) -> None:
    x = problem("unequal", len(ranks))[0]["x"]
    both = 0.9 + 0.1 * torch.cat([x, 2 * x]).var((0, 2, 3))
    for result in ranks:
        assert_near(result["held"]["accumulated"], both)
        assert_near(result["held"]["var"], 0.9 + 0.1 * x.var((0, 2, 3)))


def test_compiled_in_one_graph(ranks: Results) -> None:
    for result in ranks:
        eager = result["cases"]["unequal"]
        compiled = {k.replace("_orig_mod.", ""): v for k, v in result["compiled"].items()}
        assert compiled.keys() == eager.keys()
        assert_close(compiled, eager, **EXACT)


def test_a_subgroup_is_a_batch_of_its_own(ranks: Results) -> None:
    data, _ = problem("unequal", len(ranks))
    parts = data["x"].split(list(data["counts"]))
    members = torch.cat([parts[0], parts[-1]])
    expected = nn.functional.batch_norm(
        members, None, None, data["weight"], data["bias"], training=True
    )
    y = torch.cat([ranks[0]["subgroups"]["y"], ranks[-1]["subgroups"]["y"]])
    assert_near(y, expected)


def test_a_group_without_this_rank_is_an_error_of_its_own(ranks: Results) -> None:
    for result in ranks[1:-1]:
        assert (
            "a process group that its rank is a member of; got rank 1"
            in (result["subgroups"]["error"])
        )
        assert result["subgroups"]["eval"].isfinite().all()  # which talks to nobody


def test_who_waits_in_vain_says_which_layer(ranks: Results) -> None:
    errors = ranks[0]["failing"]
    assert set(errors) == {"forward", "backward"}
    for text in errors.values():
        assert text.startswith("layer '1', SyncBatchNorm(3,")
        assert "rank 0" in text


# One process, no group


def test_outside_of_a_group_it_is_plain_batch_norm() -> None:
    sync, plain = nw.nn.SyncBatchNorm(3, dtype=F64), nw.nn.BatchNorm(3, dtype=F64)
    x = torch.randn(4, 3, 5, dtype=F64)
    assert torch.equal(sync(x), plain(x))
    assert torch.equal(sync.running_var, plain.running_var)
    assert torch.equal(sync.eval()(x), plain.eval()(x))


def test_arguments_and_state_are_torch_nns() -> None:
    sync = nw.nn.SyncBatchNorm(3, 1e-3, 0.2, True, True, None)
    theirs = nn.SyncBatchNorm(3, 1e-3, 0.2, True, True, None)
    assert isinstance(sync, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(sync, nn.SyncBatchNorm)
    theirs.load_state_dict(sync.state_dict())
    assert list(sync.state_dict()) == list(theirs.state_dict())
    assert (sync.eps, sync.momentum, sync.process_group) == (1e-3, 0.2, None)


def test_convert_keeps_options_shares_tensors_and_layers() -> None:
    shared = nw.nn.BatchNorm2d(3, activation="relu", nonfinite="skip")
    model = nn.Sequential(shared, nn.BatchNorm2d(3), shared, nn.ReLU()).eval()
    weight, mean = model[1].weight, model[1].running_mean
    converted = nw.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(m) for m in converted] == [nw.nn.SyncBatchNorm] * 3 + [nn.ReLU]
    assert converted[0] is converted[2]
    assert (converted[0].activation, converted[0].nonfinite) == ("relu", "skip")
    assert converted[1].weight is weight
    assert converted[1].running_mean is mean
    assert not converted[1].training
    assert converted(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
