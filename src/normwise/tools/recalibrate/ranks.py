"""Several processes with a part of the data each: one exchange a pass."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from normwise.errors import InputError, message

__all__ = ["Ranks"]


class Ranks:
    """The processes of ``group`` (torch.distributed's default group if None); one process if
    torch.distributed is not in use.

    Raises:
        InputError: if this process is not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.size, self.rank = 1, 0
        if dist.is_available() and dist.is_initialized():
            self.rank = dist.get_rank(group)
            if self.rank < 0:
                raise InputError(
                    message(
                        "only the ranks of group= recalibrate",
                        f"rank {dist.get_rank()}, which is not in it",
                        "if dist.get_rank(group) >= 0: nw.recalibrate(..., group=group)",
                    )
                )
            self.size = dist.get_world_size(group)
        elif group is not None:
            raise InputError(
                message(
                    "group= is a process group of torch.distributed",
                    "no initialised torch.distributed",
                    "dist.init_process_group(...), or group=None",
                )
            )

    def exchange(self, mine: Any, error: Exception | None = None) -> list[Any]:
        """What every rank holds, by rank. A rank that failed says so here, so that no other waits
        for it; then all of them fail.

        Raises:
            error: on the rank that failed.
            InputError: on the others.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return [mine]
        failure = None if error is None else f"{type(error).__name__}: {error}"
        all_of_them: list[Any] = [None] * self.size
        dist.all_gather_object(all_of_them, (failure, mine), group=self.group)
        if error is not None:
            raise error
        for rank, (failed, _) in enumerate(all_of_them):
            if failed is not None:
                raise InputError(
                    message(
                        "all ranks recalibrate, or none",
                        f"a failure on rank {rank} ({failed})",
                        f"the traceback of rank {rank}",
                    )
                )
        return [theirs for _, theirs in all_of_them]
