"""``watch``: its contract, and how its parts come together."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normwise.errors import InputError, message
from normwise.tools.norms import Layers, chosen, core
from normwise.tools.watch.files import Scalars, open_file, steadfast
from normwise.tools.watch.record import WatchRecord
from normwise.tools.watch.watcher import Watcher

__all__ = ["watch"]

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def _is_norm(module: nn.Module) -> bool:
    """torch.nn's and all derived from them; frozen ones of any library by their buffers."""
    if isinstance(module, _NORMS):
        return True
    return all(
        isinstance(getattr(module, n, None), Tensor) for n in ("running_mean", "running_var")
    )


def _norms(model: nn.Module, layers: Layers | None) -> dict[str, nn.Module]:
    found = {n: m for n, m in core(model).named_modules() if _is_norm(m)}
    # The running statistics of a domain are a module within the norm, and none themselves.
    found = {n: m for n, m in found.items() if type(m).forward is not nn.Module.forward}
    wanted = chosen(found, layers) if found else set()
    if not wanted:
        raise InputError(
            message(
                "a model to watch holds norms that layers= means",
                f"{type(model).__name__} with {len(found) or 'no'} norms, none of them meant",
                "a model with norms of torch.nn or normwise, and layers=None for all of them",
            )
        )
    return {n: m for n, m in found.items() if n in wanted}


def _check(every: int, values: int, keep: int, start: int, percentiles: Sequence[float]) -> None:
    for name, value, least in (("every", every, 1), ("values", values, 16), ("keep", keep, 2),
                               ("start", start, 0)):  # fmt: skip
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(
                message(f"{name} is an integer from {least}", repr(value), f"{name}={least}")
            )
    good = [p for p in percentiles if math.isfinite(p) and 0 <= p <= 100]
    if not good or len(good) != len(percentiles) or sorted(set(good)) != list(percentiles):
        raise InputError(
            message("percentiles rise from 0 to 100", repr(percentiles), "percentiles=(15, 50, 85)")
        )


@contextlib.contextmanager
def watch(
    model: nn.Module,
    *,
    every: int = 100,
    values: int = 1024,
    percentiles: Sequence[float] = (1, 15, 50, 85, 99),
    layers: Layers | None = None,
    path: str | os.PathLike[str] | None = None,
    tensorboard: Any = None,
    start: int = 0,
    keep: int = 2000,
) -> Iterator[WatchRecord]:
    r"""Record through training what the norms of a model see and do.

    In the block every ``every``-th training forward is measured: for each norm percentiles of its
    input and output and of :math:`\gamma` and :math:`\beta`, the running statistics against the
    batch's, the gradient norms of :math:`\gamma`, :math:`\beta` and the input, and how many inputs
    are inf or NaN (figure 1 of Ioffe & Szegedy 2015, for every layer). The columns are those of
    :class:`WatchRecord`. The numbers of the training stay the same bit for bit: nothing random is
    drawn, nothing written to. Between measured steps the model has one hook and its norms none.

    Args:
        model: any module with norms: torch.nn's and normwise's of all kinds, subclasses, and what
            has a ``running_mean`` and a ``running_var``. Give what the training calls: the
            DistributedDataParallel or compiled module, if there is one.
        every: which training steps are measured: start, start + every, …. A step is a forward of
            the model in training mode. Where the model itself is never called (a container whose
            parts are), a step begins when a norm is called again.
        values: percentiles are those of at most so many values, evenly spread over the tensor.
        percentiles: from 0 to 100, rising.
        layers: the norms to watch: names (``'stem.*'`` is a pattern), modules, or
            ``choose(name, module) -> bool``. None for all.
        path: a file for the rows: ``.jsonl`` gets each line whole while the training runs and
            survives a crash; ``.parquet`` (pyarrow, ``normwise[watch]``) is written at the end, in
            one piece, from such lines beside it. Rows are added to a file that is there. Of several
            ranks each writes its own, ``<name>.rank<i>.jsonl``.
        tensorboard: a directory for TensorBoard (``normwise[watch]``), or anything with
            ``add_scalar(tag, value, step)``, which is not closed. On several ranks rank 0 writes.
        start: the number of the first step, for a run that goes on.
        keep: rows of a norm that the record keeps in memory before it thins them out.

    Yields:
        The :class:`WatchRecord`, a report that grows during the block; the last step's gradients
        come with the next forward or the end of the block.

    A forward in eval mode is marked ``mode='eval'`` and does not count as a step; the first is
    measured, then one whenever ``every`` forwards of any kind passed since. Forwards that
    activation checkpointing repeats in the backward are not counted. Of the calls of one norm in a
    forward the first 8 have rows. Blocks may be nested, also around one model. Code that
    ``torch.compile`` compiled runs no hooks: of norms in it nothing is seen, of those outside
    everything. Calls under ``torch.func`` and on fake, meta or distributed tensors are left out.

    Raises:
        InputError: no norm that ``layers`` means, an option out of range, or a name of a file that
            ends otherwise.
        OutputError: if ``path`` cannot be written to, at the beginning or the end of the block; in
            between a failing write warns, and the training goes on.
        MissingDependencyError: for what ``normwise[watch]`` brings.

    Example:
        >>> import torch, normwise as nw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), nw.nn.BatchNorm1d(8))
        >>> with nw.watch(model, every=1) as record:
        ...     for _ in range(3):
        ...         model(torch.randn(16, 4)).square().mean().backward()
        >>> [row["step"] for row in record.rows], record.rows[0]["values"]
        ([0, 1, 2], 128)
        >>> record["1"].facts["gamma_grad"] > 0
        True
    """
    _check(every, values, keep, start, percentiles)
    norms = _norms(model, layers)
    rank, ranks = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    record = WatchRecord(norms, percentiles, every, start, keep)
    with contextlib.ExitStack() as stack:
        sinks: list[Callable[[Any], None]] = []
        if path is not None:
            file = open_file(path, percentiles, rank, ranks)
            stack.callback(file.close)
            sinks.append(steadfast(file.write, os.fspath(file.path)))
        if tensorboard is not None and rank == 0:
            scalars = Scalars(tensorboard)
            stack.callback(scalars.close)
            sinks.append(steadfast(scalars.write, "TensorBoard"))
        stack.enter_context(Watcher(model, norms, record, sinks, every, values))
        yield record
