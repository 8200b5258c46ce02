"""Which batch norm goes where: up into what makes its input, down into what reads its output.

In eval a batch norm is y = a * x + b for each channel. A norm goes *up* if everything whose result
reaches it can give a * x + b instead of x, and nobody else sees the difference; *down* if everybody
who reads its output can read x instead. What is between must commute (:mod:`rules`); who is reached
by which channel is found with labels (:mod:`labels`). What goes nowhere becomes one multiply-add.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normwise.graph import rules
from normwise.graph.absorb import Taker, Weights, taker_of
from normwise.graph.labels import (
    Mixed,
    Reach,
    constant_per_channel,
    labels,
    propagate,
    reach,
    spread,
)
from normwise.graph.norms import Norm, Site, find_norms
from normwise.graph.reasons import Refusal
from normwise.graph.record import Node, Trace, Value
from normwise.graph.surroundings import Surroundings, has_hooks
from normwise.nn.batchnorm import _FusedBatchNorm

__all__ = ["Fate", "Plan", "make_plan", "replaceable"]

_KNOWN_FORWARDS = {_BatchNorm.forward, nn.SyncBatchNorm.forward, _FusedBatchNorm.forward}


@dataclass
class Fate:
    """What becomes of a norm. action: 'folded', 'merged', 'multiply-add' or 'left'."""

    action: str
    direction: str = ""
    into: tuple[str, ...] = ()
    reason: str | None = None
    detail: str = ""
    nodes: tuple[Node, ...] = ()
    owners: tuple[nn.Module, ...] = ()


@dataclass
class Plan:
    """What is to change, on the model of the trace."""

    norms: list[Norm]
    fates: dict[Norm, Fate]
    weights: Weights
    affine: dict[Norm, tuple[Tensor, Tensor]]
    surroundings: Surroundings


@dataclass(eq=False)
class _NormTaker:
    """A norm that became a multiply-add, as one that can take up another norm."""

    norm: Norm
    site: Site

    @property
    def output_axis(self) -> int:
        return self.site.axis


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


@dataclass
class _Upstream:
    region: list[Node] = field(default_factory=list)
    takers: dict[Node, Taker | _NormTaker] = field(default_factory=dict)


class Planner:
    def __init__(
        self, model: nn.Module, trace: Trace, forbidden: Iterable[tuple[str, str]] = ()
    ) -> None:
        self.trace = trace
        self.around = Surroundings(model, trace)
        self.norms = find_norms(model, trace, self.around.path_of)
        self.forbidden = set(forbidden)
        self.site_of = {s.node: (n, s) for n in self.norms for s in n.sites}
        self.order = {node: i for i, node in enumerate(trace.nodes)}
        self.weights = Weights()
        self.affine: dict[Norm, tuple[Tensor, Tensor]] = {}
        self.fates: dict[Norm, Fate] = {}
        self._takers: dict[Node, Taker | None] = {}

    def plan(self) -> Plan:
        for norm in self.norms:
            self.fates[norm] = self._fate(norm)
        return Plan(self.norms, self.fates, self.weights, self.affine, self.around)

    # -- one norm ---------------------------------------------------------------------------------

    def _fate(self, norm: Norm) -> Fate:
        try:
            self._check_norm(norm)
        except Refusal as refusal:
            return Fate("left", reason=refusal.reason, detail=refusal.detail)
        a, b = self.affine.get(norm) or norm.affine()
        self.affine[norm] = (a, b)
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            return Fate("left", reason="not-finite")
        refusals: list[Refusal] = []
        for direction, attempt in (("up", self._up), ("down", self._down)):
            if (norm.name, direction) in self.forbidden:
                refusals.append(Refusal("differs"))
                continue
            try:
                return attempt(norm, a, b)
            except Mixed:
                refusals.append(Refusal("channels-differ"))
            except Refusal as refusal:
                refusals.append(refusal)
        return self._stay(norm, refusals)

    def _stay(self, norm: Norm, refusals: list[Refusal]) -> Fate:
        """A multiply-add, where a module can stand for the norm. Why the norm went nowhere: upward
        is where it belongs, unless nothing is there."""
        first, second = refusals
        reason = second if first.reason == "no-neighbour" else first
        both = f"up: {first}; down: {second}"
        if not replaceable(norm):
            custom = norm.module is not None
            return Fate("left", reason="custom-forward" if custom else reason.reason, detail=both)
        if (norm.name, "stay") in self.forbidden:
            return Fate("left", reason="differs", detail=both)
        try:
            self._check_replaceable(norm)
        except Refusal as refusal:
            return Fate("left", reason=refusal.reason, detail=refusal.detail)
        return Fate("multiply-add", reason=reason.reason, detail=both)

    def _check_norm(self, norm: Norm) -> None:
        sites = norm.sites
        if norm.module is not None and has_hooks(norm.module):
            raise Refusal("hook", "on the norm itself")
        if any(s.training for s in sites):
            module = norm.module
            kept = module is None or getattr(module, "running_mean", None) is not None
            raise Refusal("training-mode" if kept else "no-running-statistics")
        if any(s.mask is not None for s in sites):
            raise Refusal("masked")
        first = sites[0]
        for s in sites:
            for value, same in zip(
                (s.mean, s.var, s.weight, s.bias),
                (first.mean, first.var, first.weight, first.bias),
                strict=True,
            ):
                if value is not None and value.tensor is None:
                    computed = norm.module is not None and hasattr(norm.module, "parametrizations")
                    raise Refusal("parametrized" if computed else "not-a-parameter")
                if (value is None) != (same is None) or (
                    value is not None and same is not None and value.tensor is not same.tensor
                ):
                    raise Refusal("custom-forward", "its calls differ")
            if s.eps != first.eps or s.activation != first.activation:
                raise Refusal("custom-forward", "its calls differ")
            if len(s.x.shape) < 2:
                raise Refusal("channels-differ")

    def _check_replaceable(self, norm: Norm) -> None:
        """The norm itself may go: nobody else uses its tensors."""
        nodes = [s.node for s in norm.sites]
        if replaceable(norm):
            for t in norm.tensors():
                if any(u not in nodes and u not in self.site_of for u in self._users(t)):
                    raise Refusal("used-elsewhere", "its own parameters or buffers")
        else:
            if norm.sites[0].eps > 0.5:
                raise Refusal("functional", "eps leaves no variance that makes it change nothing")
            self.around.check_own(norm.tensors(), nodes)

    def _users(self, t: Tensor) -> list[Node]:
        return self.trace.uses.get(id(t), [])

    def _check_memory(self, norm: Norm) -> None:
        """Where the norm stood, input and output will be one tensor: no writes to either, unless
        nobody but the norm reads the input."""
        for s in norm.sites:
            alone = s.x.origin == "call" and s.x.readers == [s.node] and not s.x.kept
            if not alone and {s.x.storage, s.y.storage} & self.trace.written:
                raise Refusal("in-place")

    # -- upwards ----------------------------------------------------------------------------------

    def _taker(self, node: Node) -> Taker | None:
        if node not in self._takers:
            self._takers[node] = taker_of(node, self.around.owners)
        return self._takers[node]

    def _upstream(self, norm: Norm) -> _Upstream:
        """The calls that what reaches the norm comes through, back to those that can take it."""
        found = _Upstream()
        region: set[Node] = set()
        stack = [s.x for s in norm.sites]
        seen: set[Value] = set()
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            node = value.maker
            if node is None:
                raise Refusal("no-neighbour" if value.origin != "unknown" else "in-place")
            if node in self.site_of:
                other, site = self.site_of[node]
                fate = self.fates.get(other)
                if fate is None or other.activation is not None or fate.action == "left":
                    raise Refusal("blocked", f"by {other.name}")
                if fate.action == "multiply-add":
                    if site.residual is not None:
                        raise Refusal("blocked", f"by {other.name}")
                    found.takers[node] = _NormTaker(other, site)
                else:
                    region.add(node)
                    stack += [v for v in (site.x, site.residual) if v is not None]
                continue
            taker = self._taker(node)
            if taker is not None and taker.y is value:
                found.takers[node] = taker
                continue
            if rules.kind(node) is None:
                raise self._why_not(node, value)
            region.add(node)
            stack += [v for v in node.inputs if v.dtype.is_floating_point]
        found.region = sorted(region, key=self.order.__getitem__)
        return found

    def _why_not(self, node: Node, value: Value) -> Refusal:
        weight = rules.argument(node, 1, "weight")
        if node.name.startswith(("conv", "linear", "embedding")) and isinstance(weight, Value):
            if weight.tensor is None:
                return Refusal("parametrized" if weight.origin == "call" else "not-a-parameter")
            if len(self.around.owners(weight.tensor)) > 1:
                return Refusal("shared-weight")
        return Refusal("blocked", f"by {node.name}")

    def _run(self, node: Node, values: dict[Value, Tensor]) -> list[Tensor] | None:
        """:func:`rules.run`, for norms that went somewhere too: they hand their input through."""
        if node not in self.site_of:
            return rules.run(node, values)
        _, site = self.site_of[node]
        total: Tensor = _ZERO.expand(site.x.shape)
        for v in (site.x, site.residual):
            if v is not None and v in values:
                total = total + values[v]
        return [total]

    def _demands(self, norm: Norm, up: _Upstream, a: Tensor, b: Tensor) -> list[_Demand]:
        own = {s.node: s for s in norm.sites}
        inner = set(up.region)
        values = [self._y(t) for t in up.takers.values()]
        values += [v for node in up.region for v in node.outputs]
        demands = []
        for value in values:
            if value.kept:
                demands.append(_Demand(value, _ONE, _ZERO, None, Refusal("is-output")))
            for node in value.readers:
                if node in own and own[node].x is value and own[node].residual is not value:
                    why = Refusal("channels-differ")
                    demands.append(_Demand(value, a, b, own[node].axis, why))
                elif node not in inner:
                    why = Refusal("used-elsewhere", f"by {node.name}")
                    demands.append(_Demand(value, _ONE, _ZERO, None, why))
        return demands

    def _y(self, taker: Taker | _NormTaker) -> Value:
        return taker.y if isinstance(taker, Taker) else taker.site.y

    def _up(self, norm: Norm, a: Tensor, b: Tensor) -> Fate:
        self._check_replaceable(norm)
        up = self._upstream(norm)
        if not up.takers:
            raise Refusal("no-neighbour")
        kinds = {rules.kind(n) for n in up.region if n not in self.site_of}
        if kinds & {"positive", "relu"} and bool((a <= 0).any()):
            raise Refusal("negative-scale")
        demands = self._demands(norm, up, a, b)
        takers = list(up.takers.values())
        # Straight from taker to norm no axis but the channel axes matters.
        axes = None if up.region else {t.output_axis for t in takers}
        reaches = [self._reaches(t, up.region, demands, axes) for t in takers]
        scales = [self._scale(t, r, demands) for t, r in zip(takers, reaches, strict=True)]
        shifts = self._shifts(takers, reaches, scales, demands, up.region)

        changed = {self._y(t) for t in takers} | {v for n in up.region for v in n.outputs}
        owners = self._owners_of(takers, "up")
        nodes = [*up.region, *up.takers, *(s.node for s in norm.sites)]
        self.around.check_hooks(owners, changed)
        self.around.check_static(nodes, owners)
        self._check_memory(norm)
        self._commit_up(takers, scales, shifts, list(up.takers))
        return self._gone("up", takers, nodes)

    def _owner(self, taker: Taker | _NormTaker, direction: str) -> nn.Module | None:
        if isinstance(taker, _NormTaker):
            return taker.norm.module
        return taker.before or taker.owner if direction == "down" else taker.owner

    def _owners_of(self, takers: Sequence[Taker | _NormTaker], direction: str) -> list[nn.Module]:
        owners = (self._owner(t, direction) for t in takers)
        return list(dict.fromkeys(o for o in owners if o is not None))

    def _gone(
        self, direction: str, takers: Sequence[Taker | _NormTaker], nodes: Sequence[Node]
    ) -> Fate:
        owners = [self._owner(t, direction) for t in takers]
        into = [
            t.norm.name if isinstance(t, _NormTaker) else self.around.path_of(o or t.owner)
            for t, o in zip(takers, owners, strict=True)
        ]
        merged = all(isinstance(t, _NormTaker) for t in takers)
        return Fate(
            "merged" if merged else "folded",
            direction,
            tuple(dict.fromkeys(into)),
            nodes=tuple(nodes),
            owners=tuple(self._owners_of(takers, direction)),
        )

    def _reaches(
        self,
        taker: Taker | _NormTaker,
        region: Sequence[Node],
        demands: Sequence[_Demand],
        axes: set[int] | None,
    ) -> list[Reach]:
        """Where the taker's channels arrive, for each demand; along ``axes`` alone if given."""
        y, axis = self._y(taker), taker.output_axis
        channels = y.shape[axis]
        runs = []
        for vector in labels(channels):
            seed = spread(vector, y.shape, axis)
            runs.append(propagate(region, {y: seed}, self._run))
        constants = propagate(region, {}, self._run)
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
        self, taker: Taker | _NormTaker, reaches: Sequence[Reach], demands: Sequence[_Demand]
    ) -> Tensor:
        channels = self._y(taker).shape[taker.output_axis]
        wanted = [
            (r.channel, d.at(r.channel.shape)[0]) for r, d in zip(reaches, demands, strict=True)
        ]
        scale, agree = constant_per_channel(wanted, channels, 1.0, 0.0)
        if not bool(agree.all()):
            raise self._conflict(reaches, demands, scale)
        return scale

    def _conflict(
        self, reaches: Sequence[Reach], demands: Sequence[_Demand], scale: Tensor
    ) -> Refusal:
        others = [
            d.why for r, d in zip(reaches, demands, strict=True) if d.axis is None and r.anywhere
        ]
        return others[0] if others else Refusal("channels-differ")

    def _shifts(
        self,
        takers: Sequence[Taker | _NormTaker],
        reaches: Sequence[list[Reach]],
        scales: Sequence[Tensor],
        demands: Sequence[_Demand],
        region: Sequence[Node],
    ) -> list[Tensor]:
        """How much each channel of each taker is to be shifted.

        The first taker whose channels reach an element takes its whole shift, if that is one
        number for each of its channels.
        """
        offsets = propagate(region, {}, self._run) if region else {}
        left = []
        for i, d in enumerate(demands):
            shape = reaches[0][i].channel.shape
            a, b = d.at(shape)
            offset = offsets.get(d.value)
            # a * (what arrives + offset) + b, where the offset (x + 1) itself stays as it is
            left.append(b.clone() if offset is None else a * offset + b - offset)
        size = max((float(t.abs().max()) for t in left if t.numel()), default=0.0)
        slack = 1e-9 * size
        shifts = []
        for taker, own in zip(takers, reaches, strict=True):
            channels = self._y(taker).shape[taker.output_axis]
            wanted = []
            for r, rest in zip(own, left, strict=True):
                factor = torch.where(r.channel >= 0, r.factor, 1.0)
                wanted.append((r.channel, rest / factor))
            shift, agree = constant_per_channel(wanted, channels, 0.0, slack)
            shift = torch.where(agree, shift, 0.0)
            if isinstance(taker, Taker) and not taker.takes_shift:
                shift = torch.zeros_like(shift)
            shifts.append(shift)
            for i, r in enumerate(own):
                given = torch.where(r.channel >= 0, shift[r.channel.clamp(min=0)] * r.factor, 0.0)
                left[i] = left[i] - given
        for rest, d in zip(left, demands, strict=True):
            if rest.numel() and float(rest.abs().max()) > max(slack, 0.0):
                no_place = all(isinstance(t, Taker) and not t.takes_shift for t in takers)
                if d.axis is None:
                    raise d.why
                raise Refusal("no-bias" if no_place else "channels-differ")
        self._check_relus(takers, shifts, region)
        return shifts

    def _check_relus(
        self,
        takers: Sequence[Taker | _NormTaker],
        shifts: Sequence[Tensor],
        region: Sequence[Node],
    ) -> None:
        """No shift passes a relu, also none from a constant on the way."""
        relus = [n for n in region if n not in self.site_of and rules.kind(n) == "relu"]
        if not relus:
            return
        seeds = {
            self._y(t): spread(s, self._y(t).shape, t.output_axis)
            for t, s in zip(takers, shifts, strict=True)
        }
        for start in (seeds, {}):
            values = propagate(region, start, self._run)
            for node in relus:
                before = values.get(node.inputs[0])
                if before is not None and bool(before.any()):
                    raise Refusal("blocked", f"by {node.name}")

    def _commit_up(
        self,
        takers: Sequence[Taker | _NormTaker],
        scales: Sequence[Tensor],
        shifts: Sequence[Tensor],
        nodes: Sequence[Node],
    ) -> None:
        weights = self.weights.copy()
        affine = dict(self.affine)
        done: dict[int, tuple[Tensor, Tensor]] = {}
        biases: dict[int, int] = {}
        for taker, scale, shift in zip(takers, scales, shifts, strict=True):
            key = id(taker.weight.tensor) if isinstance(taker, Taker) else id(taker.norm)
            if key in done:  # the same weights once more: they must do the same
                same = all(map(torch.equal, done[key], (scale, shift)))
                if not same:
                    raise Refusal("shared-weight")
                continue
            done[key] = (scale, shift)
            if isinstance(taker, _NormTaker):
                a, b = affine[taker.norm]
                if any(s.node not in nodes for s in taker.norm.sites):
                    raise Refusal("shared-weight", f"{taker.norm.name} is called elsewhere too")
                affine[taker.norm] = (a * scale, b * scale + shift)
                continue
            changed = [v.tensor for v in (taker.weight, taker.bias) if v is not None]
            own = [t for t in changed if t is not None]
            self.around.check_own(own, nodes)
            if taker.bias is not None:
                owner = biases.setdefault(id(taker.bias.tensor), key)
                if owner != key:
                    raise Refusal("shared-weight", "two weights have one bias")
            if not taker.scale_outputs(weights, scale, shift):
                raise Refusal("no-bias")
        self.weights, self.affine = weights, affine

    # -- downwards --------------------------------------------------------------------------------

    def _down(self, norm: Norm, a: Tensor, b: Tensor) -> Fate:
        self._check_replaceable(norm)
        if norm.activation is not None or any(s.residual is not None for s in norm.sites):
            raise Refusal("blocked", "by what the norm itself does after it")
        region, takers = self._downstream(norm)
        if not takers:
            raise Refusal("no-neighbour")
        if any(rules.kind(n) != "linear" for n in region) and bool((a <= 0).any()):
            raise Refusal("negative-scale")
        changed = {s.y for s in norm.sites} | {v for n in region for v in n.outputs}
        owners = self._owners_of([t for t, _ in takers], "down")
        nodes = [*region, *(self._node(t) for t, _ in takers), *(s.node for s in norm.sites)]
        self.around.check_hooks(owners, changed)
        self.around.check_static(nodes, owners)
        self._check_memory(norm)
        self._commit_down(norm, region, takers, a, b)
        return self._gone("down", [t for t, _ in takers], nodes)

    def _node(self, taker: Taker | _NormTaker) -> Node:
        return taker.node if isinstance(taker, Taker) else taker.site.node

    def _downstream(self, norm: Norm) -> tuple[list[Node], list[tuple[Taker | _NormTaker, Value]]]:
        """The calls that the norm's output goes through, and who takes it at the ends."""
        region: set[Node] = set()
        takers: list[tuple[Taker | _NormTaker, Value]] = []
        stack = [s.y for s in norm.sites]
        seen: set[Value] = set()
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            if value.kept:
                raise Refusal("is-output")
            for node in dict.fromkeys(value.readers):
                if node in self.site_of:
                    other, site = self.site_of[node]
                    if other is norm or site.x is not value or site.residual is value:
                        raise Refusal("blocked", f"by {other.name}")
                    if other not in self.fates:
                        self._check_norm(other)
                        if (other.name, "stay") in self.forbidden:
                            raise Refusal("differs")
                        self.affine.setdefault(other, other.affine())
                        if not replaceable(other):
                            raise Refusal("blocked", f"by {other.name}")
                        self._check_replaceable(other)
                    elif self.fates[other].action != "multiply-add":
                        raise Refusal("blocked", f"by {other.name}")
                    takers.append((_NormTaker(other, site), value))
                    continue
                taker = self._taker(node)
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
                    raise self._why_not(node, value)
        return sorted(region, key=self.order.__getitem__), takers

    def _commit_down(
        self,
        norm: Norm,
        region: list[Node],
        takers: list[tuple[Taker | _NormTaker, Value]],
        a: Tensor,
        b: Tensor,
    ) -> None:
        channels = len(a)
        seeds = [
            {s.y: spread(vector, s.y.shape, s.axis) for s in norm.sites}
            for vector in (*labels(channels), b, torch.zeros_like(b))
        ]
        at_r, at_s, at_b, at_0 = (propagate(region, seed, self._run) for seed in seeds)
        foreign = self._foreign(norm, region)
        weights, affine = self.weights.copy(), dict(self.affine)
        own = [self._node(t) for t, _ in takers]
        done: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for taker, value in takers:
            arrived = reach(at_r[value] - at_0[value], at_s[value] - at_0[value], channels)
            met = foreign.get(value)
            if met is not None and bool(((met != 0) & (arrived.channel >= 0)).any()):
                raise Refusal("blocked", "by an addition of what it cannot scale")
            scale = torch.where(arrived.channel >= 0, a[arrived.channel.clamp(min=0)], 1.0)
            shift = at_b[value] - scale * at_0[value]
            if isinstance(taker, Taker):
                slots = [i for i, v in enumerate(taker.x) if v is value]
                axis = taker.input_axis(value)
            else:
                slots, axis = [0], taker.site.axis
            alpha, beta = self._along(scale, shift, axis)
            for slot in slots:
                key = (id(taker.weight.tensor if isinstance(taker, Taker) else taker.norm), slot)
                if key in done:
                    if not all(map(torch.equal, done[key], (alpha, beta))):
                        raise Refusal("shared-weight")
                    continue
                done[key] = (alpha, beta)
                self._take_inputs(taker, slot, alpha, beta, weights, affine, own)
        self.weights, self.affine = weights, affine

    def _along(self, scale: Tensor, shift: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Both as vectors along ``axis``, if all else is the same."""
        n = scale.shape[axis]
        index = spread(torch.arange(n), scale.shape, axis)
        alpha, same = constant_per_channel([(index, scale)], n, 1.0, 0.0)
        slack = 1e-9 * float(shift.abs().max()) if shift.numel() else 0.0
        beta, alike = constant_per_channel([(index, shift)], n, 0.0, slack)
        if not bool(same.all() and alike.all()):
            raise Refusal("channels-differ")
        return alpha, beta

    def _foreign(self, norm: Norm, region: list[Node]) -> dict[Value, Tensor]:
        """Where what does not come from the norm arrives."""
        inner = {v for n in region for v in n.outputs} | {s.y for s in norm.sites}
        seeds = {
            v: 1 + torch.rand(v.shape, dtype=torch.float64, generator=torch.Generator())
            for n in region
            for v in n.inputs
            if v not in inner and v.dtype.is_floating_point
        }
        if not seeds:
            return {}
        linear = [n for n in region if rules.kind(n) == "linear"]
        if len(linear) != len(region):
            raise Refusal("blocked", "by a maximum over what it cannot scale")
        with_them, without = (propagate(region, seed, self._run) for seed in (seeds, {}))
        return {v: with_them[v] - without[v] for n in region for v in n.outputs}

    def _take_inputs(
        self,
        taker: Taker | _NormTaker,
        slot: int,
        alpha: Tensor,
        beta: Tensor,
        weights: Weights,
        affine: dict[Norm, tuple[Tensor, Tensor]],
        nodes: Sequence[Node],
    ) -> None:
        if isinstance(taker, _NormTaker):
            if any(s.node not in nodes for s in taker.norm.sites):
                raise Refusal("shared-weight", f"{taker.norm.name} is called elsewhere too")
            a, b = affine[taker.norm]
            affine[taker.norm] = (a * alpha, b + a * beta)
            return
        self.around.check_own(taker.parameters(), nodes)
        if not taker.scale_inputs(weights, slot, alpha, beta):
            raise Refusal("no-bias")


def replaceable(norm: Norm) -> bool:
    """Whether another module can stand where the norm stands."""
    module = norm.module
    return module is not None and type(module).forward in _KNOWN_FORWARDS


def make_plan(model: nn.Module, trace: Trace, forbidden: Iterable[tuple[str, str]] = ()) -> Plan:
    """The fate of each norm of ``model``, in the order in which they run.

    forbidden: (name, 'up' | 'down' | 'stay') that were tried and came out wrong.
    """
    return Planner(model, trace, forbidden).plan()
