"""One pass of the data through the model, and what the ranks saw together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn

from normwise.errors import InputError, NonFiniteError, message
from normwise.tools.recalibrate.checkpoint import Checkpoint, State, digest
from normwise.tools.recalibrate.collect import Collector, Pool
from normwise.tools.recalibrate.feed import Feed
from normwise.tools.recalibrate.layers import Layer
from normwise.tools.recalibrate.metric import Average, Metric
from normwise.tools.recalibrate.progress import Show
from normwise.tools.recalibrate.ranks import Ranks
from normwise.tools.recalibrate.transaction import RandomState, Transaction

__all__ = ["Pass", "Passes", "raise_nonfinite"]


@dataclass
class Pass:
    """What a pass found: by layer, in the order in which the layers first ran."""

    pools: dict[str, Pool]
    order: list[str] = field(default_factory=list)
    reused: set[str] = field(default_factory=set)
    average: Average = field(default_factory=Average)
    batches: int = 0
    longest: int = 0  # batches of the rank that had most

    def add(self, other: Pass) -> None:
        for name, pool in other.pools.items():
            self.pools[name].add(pool)
        self.order += [name for name in other.order if name not in self.order]
        self.reused |= other.reused
        self.average.merge(other.average)
        self.batches += other.batches
        self.longest = max(self.longest, other.batches)


def raise_nonfinite(name: str, where: tuple[int, int], ranks: int) -> NoReturn:
    rank, index = where
    place = f"batch {index}" if ranks == 1 else f"batch {index} of rank {rank}"
    raise NonFiniteError(
        message(
            "what a norm sees is finite",
            f"inf or NaN before layer {name!r} in {place}",
            "that batch of the data, or a mask; the model is as it was",
        )
    )


@dataclass
class Passes:
    """All that the passes of one run share. ``resume`` is where a killed one was, until its pass
    comes; ``loop`` is what the passes before have left, in plain numbers."""

    model: nn.Module
    layers: Sequence[Layer]
    feed: Feed
    ranks: Ranks
    transaction: Transaction
    metric: Metric | None
    checkpoint: Checkpoint | None
    show: Show
    resume: State | None = None
    loop: dict[str, Any] = field(default_factory=dict)

    def measure(self, what: str) -> dict[str, float]:
        """The metric over the data, by the statistics as they are."""
        return self._together(what, [], by_batch=False, outputs=False, step=None).average.values()

    def collect(self, step: int, *, by_batch: bool) -> Pass:
        """The moments of what every layer sees, in eval mode or normalizing by the batch."""
        what = f"recalibrate, pass {step + 1}"
        return self._together(what, self.layers, by_batch=by_batch, outputs=not by_batch, step=step)

    def _together(self, what: str, layers: Sequence[Layer], **options: Any) -> Pass:
        error, mine = None, None
        try:
            mine = self._alone(what, layers, **options)
        except Exception as failure:  # told to the other ranks, then raised
            error = failure
        parts = self.ranks.exchange(mine, error)
        whole = Pass({layer.name: Pool() for layer in layers})
        for part in parts:
            whole.add(part)
        self._check_length(whole)
        return whole

    def _check_length(self, whole: Pass) -> None:
        limit = self.feed.limit
        if not whole.batches:
            raise InputError(
                message(
                    "data has one batch at least",
                    "none" + (" on any rank" if self.ranks.size > 1 else ""),
                    "a loader that is not empty or used up; the model is as it was",
                )
            )
        if limit is not None and whole.longest < limit:
            raise InputError(
                message(
                    f"batches={limit} are taken from the data",
                    f"data that ended after {whole.longest}",
                    f"batches={whole.longest}, or batches=None for all there are",
                )
            )

    def _alone(
        self,
        what: str,
        layers: Sequence[Layer],
        *,
        by_batch: bool,
        outputs: bool,
        step: int | None,
    ) -> Pass:
        """This rank's part of a pass."""
        self.transaction.evaluate([layer.module for layer in layers] if by_batch else [])
        collector = Collector(layers, by_batch, outputs, self.ranks.rank)
        average, skip = Average(), 0
        saved = self._saved(step)
        if saved is not None:
            collector.pools, collector.order = saved.pools, saved.order
            collector.reused, average, skip = set(saved.reused), saved.average, saved.batches
            saved.start.restore()
        start = RandomState.now()
        done = 0
        with collector, torch.no_grad():
            for batch in self.feed:
                done += 1
                if saved is not None and done <= skip:
                    if done == skip:
                        self._check_same(saved, batch)
                        saved.now.restore()
                    continue
                collector.begin(done - 1)
                output = self._forward(batch, done - 1, collector)
                collector.end()
                if (name := collector.nonfinite_now()) is not None:
                    raise_nonfinite(name, (self.ranks.rank, done - 1), self.ranks.size)
                if self.metric is not None:
                    average.add(self.metric(output, batch), batch)
                self.show(what, done, len(self.feed))
                if self.checkpoint is not None and step is not None and self.checkpoint.due():
                    used = {} if by_batch else {la.name: la.read() for la in layers}
                    self.checkpoint.write(
                        State(
                            step, done, digest(batch), used,
                            collector.pools, collector.order, sorted(collector.reused), average,
                            start, RandomState.now(), self.loop,
                        )
                    )  # fmt: skip
        if done < skip:
            _other_data(f"data that ended after {done} of the {skip} batches done")
        pools = collector.pools
        if self.ranks.size > 1:  # tensors of other ranks' devices mean nothing here
            pools = {name: pool.on_cpu() for name, pool in pools.items()}
        return Pass(pools, collector.order, collector.reused, average, done)

    def _saved(self, step: int | None) -> State | None:
        if self.resume is None or step is None or self.resume.step != step:
            return None
        saved, self.resume = self.resume, None
        return saved if saved.batches else None

    def _check_same(self, saved: State, batch: Any) -> None:
        if digest(batch) != saved.last:
            _other_data(f"another batch {saved.batches - 1} than before")

    def _forward(self, batch: Any, index: int, collector: Collector) -> Any:
        try:
            return self.feed.run(self.model, batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if error is collector.refusal:
                raise
            kind = type(batch).__name__
            raise InputError(
                message(
                    "the model takes every batch of the data",
                    f"{type(error).__name__} for batch {index}, a {kind}: {error}",
                    "forward=lambda model, batch: model(...) to say how a batch is passed",
                )
            ) from error


def _other_data(got: str) -> NoReturn:
    raise InputError(
        message(
            "a run that goes on from a checkpoint gets the batches that it had, in the same order",
            got,
            "the same data with shuffle=False (or torch's global seed as before), or removing the "
            "checkpoint",
        )
    )
