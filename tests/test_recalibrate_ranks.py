"""recalibrate on two and three gloo ranks: what one process finds in all the data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import IMAGES, chain, errors, exact_statistics, norms
from recalibrate_ranks import part_of
from torch.testing import assert_close

import normwise as nw

HERE = Path(__file__).parent


BATCHES = [batch for rank in (0, 1) for batch in part_of(rank, 2)]


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    directory = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "recalibrate_ranks.py", str(rank), directory],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    said = [p.communicate(timeout=150)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], said
    return [torch.load(directory / str(rank)) for rank in range(3)]


def assert_all_are(found: list[dict[str, Any]], expected: torch.nn.Module) -> None:
    for name, norm in norms(expected).items():
        for rank, of_rank in enumerate(found):
            mean, var, tracked = of_rank[name]
            assert_close(mean, norm.running_mean, rtol=0, atol=1e-12, msg=f"rank {rank}, {name}")
            assert_close(var, norm.running_var, rtol=1e-12, atol=0, msg=f"rank {rank}, {name}")
            assert int(tracked) == len(BATCHES)
            assert torch.equal(mean, found[0][name][0])  # the same bits everywhere


@pytest.mark.parametrize(
    ("ranks", "what"), [(2, "exact"), (3, "exact"), (3, "ddp"), (2, "resumed")]
)
def test_ranks_find_what_one_process_does(
    found: list[dict[str, Any]], ranks: int, what: str
) -> None:
    one, _ = nw.recalibrate(chain(torch.float64), BATCHES)
    assert_all_are([found[rank][str(ranks)][what] for rank in range(ranks)], one)
    expected = exact_statistics(chain(torch.float64), IMAGES)
    assert max(errors(one, expected)) < 1e-12


@pytest.mark.parametrize(("ranks", "what"), [(2, "batch"), (3, "batch"), (3, "sync")])
def test_by_batch_too(found: list[dict[str, Any]], ranks: int, what: str) -> None:
    one, _ = nw.recalibrate(chain(torch.float64), BATCHES, mode="batch")
    assert_all_are([found[rank][str(ranks)][what] for rank in range(ranks)], one)


def test_batches_of_all_ranks_are_counted(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        report = of_rank["3"]["exact report"]
        assert (report["batches"], report["ranks"]) == (len(BATCHES), 3)


def test_the_metric_is_of_all_ranks(found: list[dict[str, Any]]) -> None:
    one = nw.recalibrate(chain(torch.float64), IMAGES, metric=lambda output, batch: output.mean())
    for of_rank in found:
        assert of_rank["metric"] == pytest.approx(one.report.facts["metric_after"], rel=1e-9)


def test_a_failure_on_one_rank_ends_all(found: list[dict[str, Any]]) -> None:
    for rank, of_rank in enumerate(found):
        expected = "RuntimeError for batch 0" if rank == 1 else "a failure on rank 1 (InputError"
        assert expected in of_rank["failure"]


def test_no_data_on_any_rank(found: list[dict[str, Any]]) -> None:
    assert all("got none on any rank" in of_rank["no data"] for of_rank in found)


def test_a_rank_outside_the_group_is_told(found: list[dict[str, Any]]) -> None:
    assert "got rank 2, which is not in it" in found[2]["outside"]
