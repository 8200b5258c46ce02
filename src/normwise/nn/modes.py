"""Contexts that say, for all norms that a thread calls, which statistics move, and when.

A layer's forward pays one truth test for them (``if ACTIVE``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from normwise.errors import InputError, message
from normwise.moments import Moments

__all__ = [
    "ACTIVE",
    "DEFAULT",
    "Accumulator",
    "Modes",
    "accumulate_statistics",
    "checkpoint_contexts",
    "current",
    "domain",
    "hold_statistics",
]


class Accumulator:
    """Moments of the batches that each layer saw, merged, and how to take them in at the end."""

    def __init__(self) -> None:
        self.entries: dict[Any, tuple[Moments, Callable[[Moments], None]]] = {}

    def add(self, key: Any, moments: Moments, take_in: Callable[[Moments], None]) -> None:
        before = self.entries.get(key)
        if before is not None:
            moments = before[0].merge(moments)
        self.entries[key] = (moments, take_in)

    def take_in(self) -> None:
        entries, self.entries = self.entries, {}
        for moments, take_in in entries.values():
            take_in(moments)


class Recorder:
    """The running statistics that each call of a region met, for its second run to meet again:
    batch renorm, and whoever normalizes with running statistics that move, depends on them."""

    def __init__(self) -> None:
        self.met: list[tuple[Any, Any, Any]] = []
        self.position: int | None = None  # None while recording

    def __call__(self, statistics: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        if self.position is None:
            mean, var, tracked = (None if t is None else t.detach().clone() for t in statistics)
            self.met.append((mean, var, tracked))
            return statistics
        self.position += 1
        return self.met[self.position - 1]


@dataclass(frozen=True)
class Modes:
    """What is in force in a thread."""

    hold: bool = False
    accumulator: Accumulator | None = None
    domain: str | None = None
    recorder: Recorder | None = None


DEFAULT = Modes()

# Thread -> what is in force there; a thread outside of all contexts has no entry.
ACTIVE: dict[int, Modes] = {}


def current() -> Modes:
    """What is in force in this thread."""
    return ACTIVE.get(threading.get_ident(), DEFAULT)


# Dynamo cannot trace a thread's number: compiled code inside a context breaks its graph here. (The
# mark of torch.compiler.disable, which itself would import the compiler.)
current._torchdynamo_disable = True  # type: ignore[attr-defined] # dynamo's own mark


@contextlib.contextmanager
def _in_force(**changes: Any) -> Iterator[None]:
    thread = threading.get_ident()
    before = ACTIVE.get(thread)
    ACTIVE[thread] = replace(before or DEFAULT, **changes)
    try:
        yield
    finally:
        if before is None:
            del ACTIVE[thread]
        else:
            ACTIVE[thread] = before


def hold_statistics() -> AbstractContextManager[None]:
    """No running statistic of a normwise layer moves in the block (of this thread).

    Training layers go on normalizing by their batch. Stronger than a layer's ``update_stats``.

    Example:
        >>> import torch, normwise as nw
        >>> bn = nw.nn.BatchNorm1d(3)
        >>> with nw.hold_statistics():
        ...     y = bn(torch.randn(8, 3))
        >>> int(bn.num_batches_tracked)
        0
    """
    return _in_force(hold=True)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` for :func:`torch.utils.checkpoint.checkpoint`: statistics move once.

    Activation checkpointing runs the forward a second time during the backward, and torch.nn's
    running statistics move a second time with it (pytorch issue 96136). Here the second run meets
    the statistics that the first one met, and moves none.

    Example:
        >>> import torch, normwise as nw
        >>> from torch.utils.checkpoint import checkpoint
        >>> bn, x = nw.nn.BatchNorm1d(3), torch.randn(8, 3, requires_grad=True)
        >>> y = checkpoint(bn, x, use_reentrant=False, context_fn=nw.checkpoint_contexts)
        >>> y.square().mean().backward()
        >>> int(bn.num_batches_tracked)
        1
    """
    recorder = Recorder()
    return _in_force(recorder=recorder), _replay(recorder)


class _replay:
    """The context of the second run; entered once for each backward through the region."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.inner: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self.recorder.position = 0
        inner = _in_force(hold=True, recorder=self.recorder)
        inner.__enter__()
        self.inner.append(inner)

    def __exit__(self, *error: Any) -> None:
        self.inner.pop().__exit__(*error)


@contextlib.contextmanager
def accumulate_statistics() -> Iterator[None]:
    """The micro-batches of one optimiser step move the running statistics once, as one batch.

    In the block each layer normalizes every micro-batch by itself, as ever; its running statistics
    wait, and take in the exact merge of the micro-batches' moments at the end of the block: what
    one step on the whole batch would have given (pytorch issue 46516; "deferred batch norm" of
    Kim et al. 2020, torchgpipe, section 3). ``num_batches_tracked`` grows by one. After an
    exception nothing moves. Costs one more read of each input.

    Example:
        >>> import torch, normwise as nw
        >>> bn, whole = nw.nn.BatchNorm1d(3), nw.nn.BatchNorm1d(3)
        >>> x = torch.randn(12, 3)
        >>> with nw.accumulate_statistics():
        ...     for micro_batch in x.split(5):
        ...         y = bn(micro_batch)
        >>> _ = whole(x)
        >>> torch.allclose(bn.running_var, whole.running_var), int(bn.num_batches_tracked)
        (True, 1)
    """
    accumulator = Accumulator()
    with _in_force(accumulator=accumulator):
        yield
    accumulator.take_in()


def domain(name: str | None) -> AbstractContextManager[None]:
    """Layers that have running statistics of this name (``add_domains``) use and move those.

    Affine parameters are shared (Chang et al. 2019 give each domain its own statistics and
    parameters; Li et al. 2017 the statistics alone, as here). ``None`` goes back to the layers'
    main statistics. Layers without domains are not affected; one that has domains, but not this
    one, raises InputError.

    Example:
        >>> import torch, normwise as nw
        >>> bn = nw.nn.BatchNorm1d(3, domains=["day", "night"])
        >>> with nw.domain("night"):
        ...     y = bn(torch.randn(8, 3))
        >>> int(bn.num_batches_tracked), int(bn.domains["night"].num_batches_tracked)
        (0, 1)
    """
    if name is not None and (not isinstance(name, str) or not name):
        raise InputError(
            message(
                "a domain has a name", repr(name), "nw.domain('night'), or None for the main one"
            )
        )
    return _in_force(domain=name)
