"""One of three gloo ranks; started by test_recalibrate_ranks.py.

Usage: recalibrate_ranks.py <rank> <directory>. Writes what it found to <directory>/<rank>.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from digits import IMAGES, chain, norms
from torch import Tensor, nn

import normwise as nw
from normwise.tools.recalibrate import checkpoint as checkpoint_module


def part_of(rank: int, ranks: int) -> list[Tensor]:
    """Uneven parts of the digits; the middle one of three ranks has none."""
    if (rank, ranks) == (1, 3):
        return []
    return list((IMAGES[:1200] if rank == 0 else IMAGES[1200:]).split(170))


def statistics(model: nn.Module) -> dict[str, Any]:
    return {
        name: (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        for name, norm in norms(model).items()
    }


def failure(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def stopping(at: int) -> Callable[[nn.Module, Tensor], Any]:
    count = iter(range(1000))

    def forward(model: nn.Module, batch: Tensor) -> Any:
        if next(count) == at:
            raise KeyboardInterrupt
        return model(batch)

    return forward


def both_modes(mine: list[Tensor], group: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mode in ("exact", "batch"):
        model, report = nw.recalibrate(chain(torch.float64), mine, mode=mode, group=group)
        found[mode] = statistics(model)
        found[f"{mode} report"] = report.to_dict()
    return found


def resumed(rank: int, group: Any, path: Path) -> dict[str, Any]:
    """Two ranks stop: rank 0 before its first batch of pass 2 is written, rank 1 after."""
    checkpoint_module._SHARE = 0
    mine, model = part_of(rank, 2), chain(torch.float64)
    stop = stopping(len(mine) + rank)
    try:
        nw.recalibrate(model, mine, checkpoint=path, forward=stop, group=group)
    except KeyboardInterrupt:
        return statistics(nw.recalibrate(model, mine, checkpoint=path, group=group).model)
    raise AssertionError("nothing stopped it")


def main(rank: int, directory: Path) -> dict[str, Any]:
    mine, model = part_of(rank, 3), chain(torch.float64)
    pair = dist.new_group([0, 1])
    found: dict[str, Any] = {"3": both_modes(mine, None)}
    if rank < 2:
        found["2"] = both_modes(part_of(rank, 2), pair)
        found["2"]["resumed"] = resumed(rank, pair, directory / "checkpoint")
    else:
        found["outside"] = failure(lambda: nw.recalibrate(model, mine, group=pair))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(chain(torch.float64))
    found["3"]["sync"] = statistics(nw.recalibrate(synced, mine, mode="batch").model)
    wrapped = nn.parallel.DistributedDataParallel(chain(torch.float64))
    found["3"]["ddp"] = statistics(nw.recalibrate(wrapped, mine).model)
    measured = nw.recalibrate(model, mine, metric=lambda output, batch: output.mean())
    found["metric"] = measured.report.facts["metric_after"]
    broken = [torch.zeros(2, 7, dtype=torch.float64)] if rank == 1 else mine
    found["failure"] = failure(lambda: nw.recalibrate(model, broken))
    found["no data"] = failure(lambda: nw.recalibrate(model, []))
    return found


if __name__ == "__main__":
    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=3,
        timeout=timedelta(seconds=120),
    )
    found = main(rank, directory)
    torch.save(found, directory / str(rank))
    dist.destroy_process_group()
