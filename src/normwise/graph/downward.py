"""A norm goes down: everybody who reads its output reads x instead of a * x + b."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normwise.graph import rules
from normwise.graph.absorb import Weights
from normwise.graph.labels import (
    constant_per_channel,
    labels,
    propagate,
    reach,
    spread,
)
from normwise.graph.norms import Norm, replaceable
from normwise.graph.reasons import Refusal
from normwise.graph.record import Node, Value
from normwise.graph.state import AnyTaker, Fate, NormTaker, State

__all__ = ["Downward"]


def _along(scale: Tensor, shift: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Both as vectors along ``axis``, if all else is the same."""
    n = scale.shape[axis]
    index = spread(torch.arange(n), scale.shape, axis)
    alpha, same = constant_per_channel([(index, scale)], n, 1.0, 0.0)
    slack = 1e-9 * float(shift.abs().max()) if shift.numel() else 0.0
    beta, alike = constant_per_channel([(index, shift)], n, 0.0, slack)
    if not bool(same.all() and alike.all()):
        raise Refusal("channels-differ")
    return alpha, beta


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(20150211)


class Downward:
    """One norm on its way down."""

    def __init__(self, state: State, norm: Norm) -> None:
        self.state = state
        self.norm = norm

    def go(self, a: Tensor, b: Tensor) -> Fate:
        """The fate of a norm that went down; the decision stands in the state.

        Raises:
            Refusal, Mixed: if it cannot.
        """
        norm = self.norm
        self.state.check_replaceable(norm)
        if norm.activation is not None or any(s.residual is not None for s in norm.sites):
            raise Refusal("blocked", "by what the norm itself does after it")
        region, ends = self._downstream()
        if not ends:
            raise Refusal("no-neighbour")
        if any(rules.kind(n) != "linear" for n in region) and bool((a <= 0).any()):
            raise Refusal("negative-scale")
        takers = [taker for taker, _ in ends]
        changed = {s.y for s in norm.sites} | {v for n in region for v in n.outputs}
        self.state.check_place("down", norm, takers, region, changed)
        self._commit(region, ends, a, b)
        return self.state.gone("down", takers, region)

    def _downstream(self) -> tuple[list[Node], list[tuple[AnyTaker, Value]]]:
        """The calls that the norm's output goes through, and who takes it at the ends."""
        region: set[Node] = set()
        takers: list[tuple[AnyTaker, Value]] = []
        stack = [s.y for s in self.norm.sites]
        seen: set[Value] = set()
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            if value.kept:
                raise Refusal("is-output")
            for node in dict.fromkeys(value.readers):
                if node in self.state.site_of:
                    takers.append((self._norm_taker(node, value), value))
                    continue
                taker = self.state.taker(node)
                if taker is not None:
                    if value not in taker.x or sum(v is value for v in node.inputs) != sum(
                        v is value for v in taker.x
                    ):
                        raise Refusal("blocked", f"by {node.name}")
                    takers.append((taker, value))
                elif rules.kind(node) in ("linear", "positive"):
                    region.add(node)
                    stack += [v for v in node.outputs if v.dtype.is_floating_point]
                else:
                    raise self.state.why_not(node, value)
        return self.state.in_order(region), takers

    def _norm_taker(self, node: Node, value: Value) -> NormTaker:
        """Another norm that reads the output, and that is or can become a multiply-add."""
        state = self.state
        other, site = state.site_of[node]
        refusal = Refusal("blocked", f"by {other.name}")
        if other is self.norm or site.x is not value or site.residual is value:
            raise refusal
        if other in state.fates:
            if state.fates[other].action != "multiply-add":
                raise refusal
            return NormTaker(other, site)
        try:
            state.check_norm(other)
            state.check_replaceable(other)
        except Refusal:
            raise refusal from None
        if not replaceable(other) or (other.name, "stay") in state.forbidden:
            raise refusal
        state.affine.setdefault(other, other.affine())
        return NormTaker(other, site)

    def _commit(
        self,
        region: list[Node],
        ends: list[tuple[AnyTaker, Value]],
        a: Tensor,
        b: Tensor,
    ) -> None:
        state, channels = self.state, len(a)
        r, s, plain, nothing = (
            {site.y: spread(vector, site.y.shape, site.axis) for site in self.norm.sites}
            for vector in (*labels(channels), b, torch.zeros_like(b))
        )
        if all(rules.kind(n) == "linear" for n in region):
            # Other sizes at other positions, so that x - x.flip(3) does not seem to reach nobody.
            for value in r:
                sizes = 1 + torch.rand(value.shape, dtype=torch.float64, generator=_generator())
                r[value], s[value] = r[value] * sizes, s[value] * sizes
        at_r, at_s, at_b, at_0 = (
            propagate(region, seeds, state.run) for seeds in (r, s, plain, nothing)
        )
        foreign = self._foreign(region)
        weights, affine = state.weights.copy(), dict(state.affine)
        nodes = [taker.node for taker, _ in ends]
        done: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for taker, value in ends:
            arrived = reach(at_r[value] - at_0[value], at_s[value] - at_0[value], channels)
            met = foreign.get(value)
            if met is not None and bool(((met != 0) & (arrived.channel >= 0)).any()):
                raise Refusal("blocked", "by an addition of what it cannot scale")
            scale = torch.where(arrived.channel >= 0, a[arrived.channel.clamp(min=0)], 1.0)
            shift = at_b[value] - scale * at_0[value]
            alpha, beta = _along(scale, shift, taker.input_axis(value))
            for slot in (i for i, v in enumerate(taker.x) if v is value):
                key = (taker.key, slot)
                if key not in done:
                    done[key] = (alpha, beta)
                    self._take(taker, slot, alpha, beta, weights, affine, nodes)
                elif not all(map(torch.equal, done[key], (alpha, beta))):
                    raise Refusal("shared-weight", "its calls would need different weights")
        state.weights, state.affine = weights, affine

    def _foreign(self, region: list[Node]) -> dict[Value, Tensor]:
        """Where what does not come from the norm arrives."""
        inner = {v for n in region for v in n.outputs} | {s.y for s in self.norm.sites}
        seeds = {
            v: 1 + torch.rand(v.shape, dtype=torch.float64, generator=_generator())
            for n in region
            for v in n.inputs
            if v not in inner and v.dtype.is_floating_point
        }
        if not seeds:
            return {}
        linear = [n for n in region if rules.kind(n) == "linear"]
        if len(linear) != len(region):
            raise Refusal("blocked", "by a maximum over what it cannot scale")
        with_them, without = (propagate(region, seed, self.state.run) for seed in (seeds, {}))
        return {v: with_them[v] - without[v] for n in region for v in n.outputs}

    def _take(
        self,
        taker: AnyTaker,
        slot: int,
        alpha: Tensor,
        beta: Tensor,
        weights: Weights,
        affine: dict[Norm, tuple[Tensor, Tensor]],
        nodes: Sequence[Node],
    ) -> None:
        if isinstance(taker, NormTaker):
            self.state.check_calls(taker.norm, nodes)
            a, b = affine[taker.norm]
            affine[taker.norm] = (a * alpha, b + a * beta)
            return
        self.state.around.check_own(taker.parameters(), nodes)
        if not taker.scale_inputs(weights, slot, alpha, beta):
            raise Refusal("no-bias")
