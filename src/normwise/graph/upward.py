"""A norm goes up: everything whose result reaches it gives a * x + b instead of x."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normwise.graph import rules
from normwise.graph.labels import (
    Reach,
    constant_per_channel,
    labels,
    propagate,
    reach,
    spread,
)
from normwise.graph.norms import Norm
from normwise.graph.reasons import Refusal
from normwise.graph.record import Node, Value
from normwise.graph.state import AnyTaker, Fate, NormTaker, State

__all__ = ["Upward"]


@dataclass
class _Demand:
    """At ``value`` scale * it + shift is wanted; vectors along ``axis``, or 1 and 0 for all."""

    value: Value
    scale: Tensor
    shift: Tensor
    axis: int | None
    why: Refusal

    def at(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        if self.axis is None:
            return self.scale.expand(tuple(shape)), self.shift.expand(tuple(shape))
        return spread(self.scale, shape, self.axis), spread(self.shift, shape, self.axis)


_ONE, _ZERO = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)


class Upward:
    """One norm on its way up."""

    def __init__(self, state: State, norm: Norm) -> None:
        self.state = state
        self.norm = norm

    def go(self, a: Tensor, b: Tensor) -> Fate:
        """The fate of a norm that went up; the decision stands in the state.

        Raises:
            Refusal, Mixed: if it cannot.
        """
        self.state.check_replaceable(self.norm)
        region, takers = self._upstream()
        kinds = {rules.kind(n) for n in region if n not in self.state.site_of}
        if kinds & {"positive", "relu"} and bool((a <= 0).any()):
            raise Refusal("negative-scale")
        demands = self._demands(region, takers, a, b)
        # Straight from taker to norm no axis but the channel axes matters.
        axes = None if region else {t.output_axis for t in takers}
        run = self.state.run
        constants = propagate(region, {}, run)
        reaches, scales = [], []
        for taker in takers:
            # Taker by taker, and each asked first what may refuse it: in a dense block, where each
            # norm has all layers before it above it, the first one does, after two demands of 600.
            runs = [
                propagate(region, {taker.y: spread(v, taker.y.shape, taker.output_axis)}, run)
                for v in labels(taker.y.shape[taker.output_axis])
            ]
            first = [d for d in demands if d.value is taker.y or d.axis is not None]
            self._scale(taker, self._reaches(taker, runs, first, constants, axes), first)
            reaches.append(self._reaches(taker, runs, demands, constants, axes))
            scales.append(self._scale(taker, reaches[-1], demands))
        shifts = self._shifts(takers, reaches, demands, constants)
        self._check_relus(takers, shifts, region)
        changed = {t.y for t in takers} | {v for n in region for v in n.outputs}
        self.state.check_place("up", self.norm, takers, region, changed)
        self._commit(takers, scales, shifts)
        return self.state.gone("up", takers, region)

    def _upstream(self) -> tuple[list[Node], list[AnyTaker]]:
        """The calls that what reaches the norm comes through, back to those that can take it."""
        takers: dict[Node, AnyTaker] = {}
        region: set[Node] = set()
        stack = [s.x for s in self.norm.sites]
        seen: set[Value] = set()
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            node = value.maker
            if node is None:
                raise Refusal("no-neighbour" if value.origin != "unknown" else "in-place")
            if node in self.state.site_of:
                other, site = self.state.site_of[node]
                fate = self.state.fates.get(other)
                if fate is None or other.activation is not None or fate.action == "left":
                    raise Refusal("blocked", f"by {other.name}")
                if fate.action == "multiply-add":
                    if site.residual is not None:
                        raise Refusal("blocked", f"by {other.name}")
                    takers[node] = NormTaker(other, site)
                else:
                    region.add(node)
                    stack += [v for v in (site.x, site.residual) if v is not None]
                continue
            taker = self.state.taker(node)
            if taker is not None and taker.y is value:
                takers[node] = taker
                continue
            if rules.kind(node) is None:
                raise self.state.why_not(node, value)
            region.add(node)
            stack += [v for v in node.inputs if v.dtype.is_floating_point]
        return self.state.in_order(region), list(takers.values())

    def _demands(
        self, region: Sequence[Node], takers: Sequence[AnyTaker], a: Tensor, b: Tensor
    ) -> list[_Demand]:
        """What the norm asks for where it reads, and everybody else: that nothing changes."""
        own = {s.node: s for s in self.norm.sites}
        inner = set(region)
        values = [t.y for t in takers]
        values += [v for node in region for v in node.outputs]
        demands = []
        for value in values:
            if value.kept:
                demands.append(_Demand(value, _ONE, _ZERO, None, Refusal("is-output")))
            for node in value.readers:
                if node in own and own[node].residual is value:
                    raise Refusal("used-elsewhere", "as the residual of the norm itself")
                if node in own and own[node].x is value:
                    why = Refusal("channels-differ")
                    demands.append(_Demand(value, a, b, own[node].axis, why))
                elif node not in inner:
                    why = Refusal("used-elsewhere", f"by {node.name}")
                    demands.append(_Demand(value, _ONE, _ZERO, None, why))
        return demands

    def _reaches(
        self,
        taker: AnyTaker,
        runs: Sequence[dict[Value, Tensor]],
        demands: Sequence[_Demand],
        constants: dict[Value, Tensor],
        axes: set[int] | None,
    ) -> list[Reach]:
        """Where the taker's channels arrive, for each demand; along ``axes`` alone if given.

        runs: what its labels became; constants: what is there without them."""
        channels = taker.y.shape[taker.output_axis]
        found = []
        for d in demands:
            nothing = _ZERO.expand(d.value.shape)
            at = [run.get(d.value, nothing) - constants.get(d.value, nothing) for run in runs]
            if axes is not None:
                for dim, size in enumerate(d.value.shape):
                    if dim not in axes and dim != d.axis:
                        at = [t.narrow(dim, 0, min(1, size)) for t in at]
            found.append(reach(at[0], at[1], channels))
        return found

    def _scale(
        self, taker: AnyTaker, reaches: Sequence[Reach], demands: Sequence[_Demand]
    ) -> Tensor:
        channels = taker.y.shape[taker.output_axis]
        wanted = [
            (r.channel, d.at(r.channel.shape)[0]) for r, d in zip(reaches, demands, strict=True)
        ]
        scale, agree = constant_per_channel(wanted, channels, 1.0, 0.0)
        if bool(agree.all()):
            return scale
        for r, d in zip(reaches, demands, strict=True):
            if d.axis is None and r.anywhere:
                raise d.why
        raise Refusal("channels-differ")

    def _shifts(
        self,
        takers: Sequence[AnyTaker],
        reaches: Sequence[list[Reach]],
        demands: Sequence[_Demand],
        offsets: dict[Value, Tensor],
    ) -> list[Tensor]:
        """How much each channel of each taker is to be shifted.

        The first taker whose channels reach an element takes its whole shift, if that is one
        number for each of its channels.
        """
        left = []
        for i, d in enumerate(demands):
            shape = reaches[0][i].channel.shape
            a, b = d.at(shape)
            offset = offsets.get(d.value)
            # a * (what arrives + offset) + b, where the offset (x + 1) itself stays as it is
            left.append(b.clone() if offset is None else a * offset + b - offset)
        size = max((float(t.abs().max()) for t in left if t.numel()), default=0.0)
        slack = 1e-9 * size  # of rounding: float64 leaves 1e-16 of each term
        shifts = []
        for taker, own in zip(takers, reaches, strict=True):
            channels = taker.y.shape[taker.output_axis]
            wanted = []
            for r, rest in zip(own, left, strict=True):
                factor = torch.where(r.channel >= 0, r.factor, 1.0)
                wanted.append((r.channel, rest / factor))
            shift, agree = constant_per_channel(wanted, channels, 0.0, slack)
            shift = torch.where(agree, shift, 0.0)
            if not taker.takes_shift:
                shift = torch.zeros_like(shift)
            shifts.append(shift)
            for i, r in enumerate(own):
                given = torch.where(r.channel >= 0, shift[r.channel.clamp(min=0)] * r.factor, 0.0)
                left[i] = left[i] - given
        for rest, d in zip(left, demands, strict=True):
            if rest.numel() and float(rest.abs().max()) > slack:
                if d.axis is None:
                    raise d.why
                no_place = not any(t.takes_shift for t in takers)
                raise Refusal("no-bias" if no_place else "channels-differ")
        return shifts

    def _check_relus(
        self,
        takers: Sequence[AnyTaker],
        shifts: Sequence[Tensor],
        region: Sequence[Node],
    ) -> None:
        """No shift passes a relu, also none from a constant on the way."""
        relus = [n for n in region if n not in self.state.site_of and rules.kind(n) == "relu"]
        if not relus:
            return
        seeds = {
            t.y: spread(s, t.y.shape, t.output_axis) for t, s in zip(takers, shifts, strict=True)
        }
        for start in (seeds, {}):
            values = propagate(region, start, self.state.run)
            for node in relus:
                before = values.get(node.inputs[0])
                if before is not None and bool(before.any()):
                    raise Refusal("blocked", f"by {node.name}")

    def _commit(
        self, takers: Sequence[AnyTaker], scales: Sequence[Tensor], shifts: Sequence[Tensor]
    ) -> None:
        state = self.state
        weights, affine = state.weights.copy(), dict(state.affine)
        nodes = [t.node for t in takers]
        done: dict[int, tuple[Tensor, Tensor]] = {}
        biases: dict[int, int] = {}
        for taker, scale, shift in zip(takers, scales, shifts, strict=True):
            if taker.key in done:  # the same weights once more: they must do the same
                if not all(map(torch.equal, done[taker.key], (scale, shift))):
                    raise Refusal("shared-weight", "its calls would need different weights")
                continue
            done[taker.key] = (scale, shift)
            if isinstance(taker, NormTaker):
                a, b = affine[taker.norm]
                state.check_calls(taker.norm, nodes)
                affine[taker.norm] = (a * scale, b * scale + shift)
                continue
            values = (taker.weight, taker.bias)
            own = [v.tensor for v in values if v is not None and v.tensor is not None]
            state.around.check_own(own, nodes)
            if taker.bias is not None:
                first = biases.setdefault(id(taker.bias.tensor), taker.key)
                if first != taker.key:
                    raise Refusal("shared-weight", "two weights have one bias")
            if not taker.scale_outputs(weights, scale, shift):
                raise Refusal("no-bias")
        state.weights, state.affine = weights, affine
