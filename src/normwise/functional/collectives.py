"""What synchronised norms ask of torch.distributed: one gather, one sum, and errors that explain.

Eager calls use the collectives themselves (asynchronous in the backward); compilers are shown the
functional ones, which stay in the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normwise.errors import CollectiveError, InputError, message

__all__ = ["Pending", "Who", "gather", "group_of", "start_sum", "summed"]

# Says which layer waits, for errors; None where nobody knows.
Who = Callable[[], str] | None


def group_of(process_group: Any) -> Any:
    """The group to talk to, or None where there is nobody else: no process group, or one of one.

    Raises:
        InputError: for a group that this process is no member of.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if process_group is None else process_group
    size = -1 if group is dist.GroupMember.NON_GROUP_MEMBER else dist.get_world_size(group)
    if size < 0:
        raise InputError(
            message(
                "a synchronised norm trains in a process group that its rank is a member of",
                f"rank {dist.get_rank()} and a group without it",
                "process_group= the group that this rank is in, as dist.new_subgroups returns it",
            )
        )
    return group if size > 1 else None


@contextlib.contextmanager
def _explained(what: str, group: Any, who: Who) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        place = "a synchronised batch norm" if who is None else who()
        raise CollectiveError(
            message(
                f"{place}: every rank of the group takes part in {what}",
                f"on rank {dist.get_rank()} ({dist.get_rank(group)} of "
                f"{dist.get_world_size(group)} in the group): {error}",
                "the log of the other ranks: one failed, or never came to this layer",
            )
        ) from error


def gather(row: Tensor, group: Any, who: Who = None) -> Tensor:
    """(n,) on every rank -> (ranks, n), in the order of the ranks."""
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional

        rows: Tensor = functional.all_gather_tensor(row.unsqueeze(0), 0, group)
        waited: Tensor = functional.wait_tensor(rows)
        return waited
    flat = row.new_empty(dist.get_world_size(group) * row.numel())  # gloo takes no other shape
    with _explained("the gather of the batch's moments (forward)", group, who):
        # The name since torch 2.13, which deprecates the old one.
        call: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        call(flat, row, group=group)
    return flat.view(-1, row.numel())


class Pending:
    """A sum over the ranks that is under way; ``wait()`` gives it."""

    def __init__(self, total: Tensor, work: Any, group: Any, who: Who) -> None:
        self.total, self.work, self.group, self.who = total, work, group, who

    def wait(self) -> Tensor:
        if self.work is not None:
            with _explained("the sum of the gradients' sums (backward)", self.group, self.who):
                self.work.wait()
        return self.total


def start_sum(values: Tensor, group: Any, who: Who = None) -> Pending:
    """The sum of ``values`` over the ranks; ``values`` stay as they are."""
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as functional

        total = functional.wait_tensor(functional.all_reduce(values, "sum", group))
        return Pending(total, None, group, who)
    total = values.clone(memory_format=torch.contiguous_format)
    with _explained("the sum of the gradients' sums (backward)", group, who):
        work = dist.all_reduce(total, group=group, async_op=True)
    return Pending(total, work, group, who)


def summed(values: Tensor, group: Any, who: Who = None) -> Tensor:
    """The sum of ``values`` over the ranks, differentiable to any order."""
    apply: Any = _AllReduce.apply
    total: Tensor = apply(values, group, who)
    return total


class _AllReduce(torch.autograd.Function):
    """The sum over the ranks as a function of this rank's term, differentiable to any order: what
    each rank's loss asks of the sum comes back to every term."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any, who: Who) -> Tensor:
        ctx.group, ctx.who = group, who
        return start_sum(values, group, who).wait()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return summed(gradient, ctx.group, ctx.who), None, None
