"""What data show: the moments of what each norm sees, in eval mode and normalizing by the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.data import SequentialSampler

from normwise.functional import batch_moments
from normwise.graph.run import tensors_in
from normwise.moments import Moments
from normwise.tools.norms import arguments_of, boolean_mask
from normwise.tools.recalibrate.feed import Feed, batch_size
from normwise.tools.recalibrate.transaction import Transaction

__all__ = ["Dynamics", "Loader", "Seen"]


@dataclass
class Seen:
    """What one batch norm saw in one pass.

    calls: moments of the input, float64 and (C,), by the place of the call among the layer's calls
    within a forward, each pooled over the batches. counts: values a channel of each call, in the
    order of the calls. largest: the largest finite magnitude of an input. nonfinite: how many
    values were not finite. dtypes: of the inputs. shapes: of the inputs, in order. repeated: the
    share of positions at the end of the sequences that repeat the last one, over all channels
    (rank 3 without a mask; the last position itself is not counted). masked: whether any call gave
    a mask.
    """

    calls: list[Moments] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    largest: float = 0.0
    nonfinite: int = 0
    dtypes: set[torch.dtype] = field(default_factory=set)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    repeated: float = 0.0
    masked: bool = False

    @property
    def moments(self) -> Moments:
        """Of all the layer saw."""
        return Moments.sum(self.calls)


@dataclass(frozen=True)
class Loader:
    """What the data say of themselves: a DataLoader's attributes, None where there is none."""

    batch_size: int | None = None
    drop_last: bool | None = None
    samples: int | None = None
    shuffled: bool | None = None

    @classmethod
    def of(cls, data: Any) -> Loader:
        size, drop = getattr(data, "batch_size", None), getattr(data, "drop_last", None)
        sampler = getattr(data, "sampler", None)
        shuffled = None if sampler is None else not isinstance(sampler, SequentialSampler)
        try:
            samples = len(sampler if sampler is not None else data.dataset)
        except (TypeError, AttributeError, NotImplementedError):
            samples = None
        return cls(
            size if isinstance(size, int) else None,
            drop if isinstance(drop, bool) else None,
            samples,
            shuffled,
        )

    @property
    def last(self) -> int | None:
        """The size of the last batch, if it can be told."""
        if not self.samples or not self.batch_size or self.drop_last is None:
            return None
        rest = self.samples % self.batch_size
        return self.batch_size if rest == 0 or self.drop_last else rest


@dataclass
class Dynamics:
    """Two passes over the same batches.

    evaluated: what the layers saw in eval mode. trained: with every batch norm normalizing by the
    batch and all else in eval mode (dropout off). order: the layers, as they first ran.
    batch_sizes: of the batches used. gap: the largest difference between the outputs of both
    passes, relative to the largest output in eval mode, each measured by root mean square; None if
    the second pass failed. error: why it failed, and in which batch.
    """

    evaluated: dict[str, Seen]
    trained: dict[str, Seen]
    order: list[str]
    batch_sizes: list[int]
    loader: Loader
    gap: float | None = None
    error: str | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Any,
        held: Sequence[Any],
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> Dynamics:
        """Run ``held``, batches of ``data``, twice; the model is as before on every exit.

        Raises:
            Exception: what the forward raises in eval mode.
        """
        feed = Feed(held, None, forward, several="")
        norms: dict[str, nn.Module] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (_BatchNorm, _InstanceNorm))
        }
        found = cls({}, {}, [], [batch_size(b) for b in held], Loader.of(data))
        with Transaction(model) as transaction, torch.no_grad():
            transaction.evaluate([])
            with _Watch(norms, found.evaluated, found.order) as watch:
                expected = [watch.outputs(feed, model, batch) for batch in held]
            transaction.evaluate([m for m in norms.values() if isinstance(m, _BatchNorm)])
            gaps = []
            with _Watch(norms, found.trained, []) as watch:
                for batch, one in zip(held, expected, strict=True):
                    try:
                        other = watch.outputs(feed, model, batch)
                    except Exception as error:  # one value a channel: it is a finding
                        found.error = f"{type(error).__name__}: {error}"
                        break
                    gaps.append(_gap(one, other))
            if found.error is None and gaps:
                found.gap = max(gaps)
        return found


def _gap(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    worst = 0.0
    for a, b in zip(expected, found, strict=False):
        if a.shape == b.shape and a.is_floating_point() and a.numel():
            scale = float(a.double().square().mean().sqrt())
            error = float((a.double() - b.double()).square().mean().sqrt())
            gap = error / scale if scale else error
            worst = max(worst, gap if math.isfinite(gap) else math.inf)
    return worst


class _Watch:
    """Hooks on the norms that fill ``into``."""

    def __init__(
        self, norms: dict[str, nn.Module], into: dict[str, Seen], order: list[str]
    ) -> None:
        self.norms, self.into, self.order = norms, into, order
        self.place: dict[str, int] = {}

    def __enter__(self) -> _Watch:
        self.handles = [
            module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
            for name, module in self.norms.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def outputs(self, feed: Feed, model: nn.Module, batch: Any) -> list[Tensor]:
        self.place = {}
        return [t.detach().cpu() for t in tensors_in(feed.run(model, batch))]

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = arguments_of(module, args, kwargs)
        x, mask = given["0"], boolean_mask(given.get("mask"))
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            return
        if name not in self.order:
            self.order.append(name)
        seen = self.into.setdefault(name, Seen())
        place = self.place.get(name, 0)
        self.place[name] = place + 1
        axis = getattr(module, "channel_dim", 1)
        x = x.detach()
        moments = batch_moments(x, axis, mask).to("cpu", torch.float64)
        seen.counts.append(int(moments.count.min()))
        seen.shapes.append(tuple(x.shape))
        seen.dtypes.add(x.dtype)
        seen.masked |= mask is not None or given.get("lengths") is not None
        finite = torch.isfinite(x)
        seen.nonfinite += int(x.numel() - finite.sum())
        if x.numel():
            seen.largest = max(seen.largest, float(torch.where(finite, x, 0).abs().max()))
        if x.dim() == 3 and not seen.masked:
            along = x if axis in (1, -2) else x.transpose(1, 2)
            seen.repeated = max(seen.repeated, _repeated(along))
        if place < len(seen.calls):
            seen.calls[place] = seen.calls[place].merge(moments)
        else:
            seen.calls.append(moments)


def _repeated(x: Tensor) -> float:
    """The share of positions of (N, C, L) that belong to a run at the end that repeats the last."""
    if x.shape[0] == 0 or x.shape[2] < 2:
        return 0.0
    same = (x == x[:, :, -1:]).all(1).flip(1)  # (N, L), from the end
    run = same.to(torch.int64).cumprod(1).sum(1) - 1
    return float(run.sum()) / float(x.shape[0] * x.shape[2])
