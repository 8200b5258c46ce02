"""Which channel of which maker arrives where: random labels, run through the calls between.

Channel k of a maker's result carries the label r[k], once more the label s[k]; all else is 0. The
calls between are linear, so an element that only channel k reaches holds (c * r[k], c * s[k]) with
some factor c: the ratio tells k, the size tells c. An element that two channels reach has a ratio
that belongs to none, except with probability zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normwise.graph.record import Node, Value

__all__ = ["Mixed", "Reach", "constant_per_channel", "labels", "propagate", "reach", "spread"]

Run = Callable[[Node, dict[Value, Tensor]], "list[Tensor] | None"]


class Mixed(Exception):
    """Several channels meet in one element, or the data decide which one passes."""


@functools.lru_cache(maxsize=256)
def labels(channels: int) -> tuple[Tensor, Tensor]:
    """Two labels for each channel, all ratios distinct; float64, the same each time: not to be
    written to."""
    generator = torch.Generator().manual_seed(20150211)
    r = 1 + torch.rand(channels, generator=generator, dtype=torch.float64)
    ratio = 1 + torch.randperm(channels, generator=generator) / max(channels, 1)
    return r, r * ratio.double()


def spread(vector: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """A vector along one axis, expanded to ``shape``."""
    view = [1] * len(shape)
    view[axis] = -1
    return vector.view(view).expand(tuple(shape))


def propagate(region: Sequence[Node], seeds: dict[Value, Tensor], run: Run) -> dict[Value, Tensor]:
    """The values of all results of ``region``, in order, from those of ``seeds``."""
    values = dict(seeds)
    for node in region:
        made = run(node, values)
        if made is None:
            raise Mixed
        values.update(zip(node.outputs, made, strict=False))
    return values


class Reach:
    """At which elements of a value a maker's channels arrive, and with which factor."""

    def __init__(self, channel: Tensor, factor: Tensor) -> None:
        self.channel = channel
        """The channel that reaches an element, -1 where none does."""
        self.factor = factor

    @property
    def anywhere(self) -> bool:
        return bool((self.channel >= 0).any())


def reach(at_r: Tensor, at_s: Tensor, channels: int) -> Reach:
    """From the labels found at a value.

    Raises:
        Mixed: where several channels meet in one element.
    """
    if not bool(at_r.any()) and not bool(at_s.any()):  # most of the pairs in a large model
        return Reach(torch.tensor(-1).expand(at_r.shape), at_r.new_zeros(()).expand(at_r.shape))
    r, s = labels(channels)
    ratios, order = (s / r).sort()
    there = at_r.abs() > 1e-9
    if bool(((at_s.abs() > 1e-9) != there).any()):
        raise Mixed
    ratio = torch.where(there, at_s / torch.where(there, at_r, 1.0), ratios[0])
    nearest = torch.searchsorted(ratios, (ratio - 0.5 / max(channels, 1)).contiguous())
    nearest = nearest.clamp(max=channels - 1)
    if bool((there & ((ratios[nearest] - ratio).abs() > 1e-9)).any()):
        raise Mixed
    channel = torch.where(there, order[nearest], -1)
    factor = torch.where(there, at_r / r[channel.clamp(min=0)], 0.0)
    return Reach(channel, factor)


def constant_per_channel(
    wanted: Sequence[tuple[Tensor, Tensor]], channels: int, otherwise: float, slack: float
) -> tuple[Tensor, Tensor]:
    """One value a channel from (channel, value) pairs, elementwise; and where they agree.

    Channels that no element has get ``otherwise``. ``slack`` is the difference that still counts
    as agreement.
    """
    low = torch.full((channels,), torch.inf, dtype=torch.float64)
    high = torch.full((channels,), -torch.inf, dtype=torch.float64)
    for channel, value in wanted:
        there = channel >= 0
        index, found = channel[there], value.expand(channel.shape)[there]
        low.scatter_reduce_(0, index, found, "amin")
        high.scatter_reduce_(0, index, found, "amax")
    absent = high < low
    agree = absent | (high - low <= slack)
    return torch.where(absent, torch.full_like(low, otherwise), low), agree
