"""``equalize``: the ranges of a convolution's channels made level with the next one's.

relu(s x) = s relu(x) for s > 0. So channel i of a convolution may be divided by any s_i > 0 if the
next one's weights on channel i are multiplied by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from normwise.errors import InputError, message
from normwise.graph import rules, verify
from normwise.graph.absorb import Taker, Weights, taker_of
from normwise.graph.edits import Edits, apply
from normwise.graph.labels import Mixed, labels, propagate, reach, spread
from normwise.graph.modules import BORDERED
from normwise.graph.reasons import Refusal
from normwise.graph.record import Node, Trace, Value, record
from normwise.graph.run import Call, copy_of, on_examples, same_random_numbers
from normwise.graph.surroundings import Surroundings
from normwise.pages import Axis, Chart
from normwise.results import Entry, Report, Result
from normwise.tools.weights import input_range, output_range

__all__ = ["EqualizeReport", "equalize"]

M = TypeVar("M", bound=nn.Module)

# Sweeps over all pairs: a chain of n layers converges geometrically; until no factor moves by more.
SWEEPS, STILL = 100, 1e-3


class EqualizeReport(Report):
    """Which pairs of layers were made level, or why a layer has no partner.

    ``entries``: ``name`` the first layer of a pair, ``action`` 'equalized' or 'left', ``into`` the
    second layer, ``reason`` one of :data:`normwise.graph.REASONS`. ``facts``: ``spread`` is the
    largest range of an output channel over the median one, (before, after), of the first layer;
    ``spread_next`` that of the second layer's input channels; ``factor`` the largest and the
    smallest s; ``error`` and ``error64`` as in :class:`~normwise.graph.FoldReport`.
    """

    title: ClassVar[str] = "equalize"
    columns: ClassVar[tuple[str, ...]] = ("spread", "spread_next", "error", "error64")

    def charts(self) -> list[Chart]:
        spreads = [
            {"layer": e.name, "spread": spread, "at": at}
            for e in self.entries
            for spread, at in zip(e.facts.get("spread") or (), ("before", "after"), strict=False)
        ]
        return [
            *super().charts(),
            Chart(
                "scatter",
                "Spread of the channels' ranges",
                "Largest range of an output channel over the median one; 1 is level.",
                spreads,
                x=Axis("layer", "layer", "layer"),
                y=Axis("spread", "largest over median", log=True),
                color=Axis("at", "equalization", "category", values=("before", "after")),
                joined=True,
                rules=[(1.0, "level")],
            ),
        ]


@dataclass
class _Pair:
    first: Taker
    second: Taker
    columns: Tensor
    """For each input channel of the second layer, the output channel of the first that it is."""
    total: Tensor = field(default_factory=lambda: torch.ones(()))
    """The product of all factors so far."""


def _where(node: Node) -> str:
    return f"by {node.name}"


class _Pairs:
    """The pairs of one recorded run."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.trace = trace
        self.around = Surroundings(model, trace)
        self.takers: dict[Node, Taker] = {}
        for node in trace.nodes:
            taker = taker_of(node, self.around.owners)
            kinds = ("convolution", "linear")
            if taker is not None and taker.kind in kinds and taker.weight_name == "weight":
                self.takers[node] = taker

    def name(self, taker: Taker) -> str:
        return self.around.path_of(taker.holder)

    def border(self, taker: Taker) -> Tensor | None:
        return taker.holder._parameters.get("border")

    def result(self, taker: Taker) -> Value:
        """What the layer gives: with a border, the sum that its module returns."""
        if type(taker.holder) in BORDERED.values() and taker.node.inside.outputs:
            return taker.node.inside.outputs[0]
        return taker.y

    def follow(self, first: Taker) -> _Pair:
        """The one layer that reads what ``first`` gives, through what commutes with a scale.

        Raises:
            Refusal: if there is none.
        """
        value, region = self.result(first), []
        changed = {first.y, value}
        while True:
            if value.kept:
                raise Refusal("is-output")
            readers = list(dict.fromkeys(value.readers))
            if len(readers) != 1:
                raise Refusal("used-elsewhere" if readers else "no-neighbour")
            node = readers[0]
            second = self.takers.get(node)
            if second is not None and value in second.x:
                break
            floating = [v for v in node.inputs if v.dtype.is_floating_point]
            # A sum is linear, but x + 1 does not scale.
            passes = rules.kind(node) is not None and node.name not in rules.SUMS
            if not passes or len(floating) != 1 or len(node.outputs) != 1:
                raise Refusal("blocked", _where(node))
            region.append(node)
            value = node.outputs[0]
            changed.add(value)
        columns = self._columns(first, second, value, region)
        tensors = [*first.parameters(), second._weight()]
        border = self.border(first)
        uses = [first.node, second.node]
        if border is not None:
            tensors.append(border)
            uses += self.trace.uses.get(id(border), [])
        self.around.check_own(tensors, uses)
        owners = [first.holder, second.holder]
        self.around.check_hooks(owners, changed)
        self.around.check_static([first.node, *region, second.node], owners)
        return _Pair(first, second, columns)

    def _columns(self, first: Taker, second: Taker, x: Value, region: list[Node]) -> Tensor:
        start, n = self.result(first), first.out_channels
        seeds = [spread(v, start.shape, first.output_axis) for v in labels(n)]
        if region:
            try:
                ends = [propagate(region, {start: s}, rules.run)[x] for s in seeds]
                found = reach(ends[0], ends[1], n).channel
            except Mixed:
                raise Refusal("channels-differ") from None
        else:
            found = reach(seeds[0], seeds[1], n).channel
        rows = found.movedim(second.input_axis(x), 0).flatten(1)
        if rows.numel() == 0 or bool((rows != rows[:, :1]).any()) or bool((rows < 0).any()):
            raise Refusal("channels-differ")
        return rows[:, 0].contiguous()


def _ranges(pair: _Pair, weights: Weights) -> tuple[Tensor, Tensor]:
    """max |w| of the first layer's outputs, and of what the second has on each of them."""
    first, second = pair.first, pair.second
    r1 = output_range(weights.of(first._weight()), first.groups, first.transposed)
    columns = input_range(weights.of(second._weight()), second.groups, second.transposed)
    r2 = torch.zeros_like(r1).scatter_reduce(0, pair.columns, columns, "amax")
    return r1, r2


def _level(pair: _Pair, weights: Weights, border: Tensor | None) -> float:
    """Make one pair level; by how much, as the largest |log s|."""
    r1, r2 = _ranges(pair, weights)
    live = (r1 > 0) & (r2 > 0) & torch.isfinite(r1) & torch.isfinite(r2)
    s = torch.where(live, (r1 / torch.where(live, r2, 1.0)).sqrt(), 1.0)
    none = torch.zeros_like(s)
    pair.first.scale_outputs(weights, 1 / s, none)
    if border is not None:
        shape = [1] * border.dim()
        shape[1 if pair.first.transposed else 0] = -1
        weights.set(border, weights.of(border) / s.view(shape))
    s_in = s[pair.columns]
    pair.second.scale_inputs(weights, 0, s_in, torch.zeros_like(s_in))
    pair.total = pair.total * s
    return float(s.log().abs().max()) if len(s) else 0.0


def _spread(ranges: Tensor) -> float:
    return float(ranges.max() / ranges.median()) if float(ranges.median()) > 0 else float("inf")


def _edits(weights: Weights, around: Surroundings) -> Edits:
    edits = Edits()
    for t, value in weights.changed.values():
        owner, name = around.owners(t)[0]
        edits.parameters[f"{around.path_of(owner)}.{name}".lstrip(".")] = value
    return edits


def _partner(pairs: _Pairs, first: Taker, forbidden: set[str]) -> _Pair | Refusal:
    try:
        if pairs.name(first) in forbidden:
            raise Refusal("differs")
        return pairs.follow(first)
    except Refusal as refusal:
        return refusal


def equalize(model: M, example_inputs: Any) -> Result[M, EqualizeReport]:
    r"""Cross-layer equalisation: the same function, with weights that int8 per tensor can hold.

    For a layer :math:`W^{(1)}`, what commutes with a positive scale of a channel (relu, leaky relu,
    pooling, reshaping, dropout in eval), and a layer :math:`W^{(2)}`,

    .. math::
        s_i = \sqrt{r^{(1)}_i / r^{(2)}_i}, \quad
        \hat W^{(1)} = S^{-1} W^{(1)}, \quad \hat b^{(1)} = S^{-1} b^{(1)}, \quad
        \hat W^{(2)} = W^{(2)} S

    with the ranges :math:`r_i = \max |W_i|` of output channel i of the first and of input channel i
    of the second layer, so that both become :math:`\sqrt{r^{(1)}_i r^{(2)}_i}`; over all pairs
    until nothing moves. Nagel, van Baalen, Blankevoort & Welling, "Data-Free Quantization Through
    Weight Equalization and Bias Correction", ICCV 2019 (arXiv 1906.04721), section 4.1.

    The result is held against the model layer by layer and end to end, in float64 and in the
    model's dtype, as :func:`normwise.fold` does it; a pair that differs beyond rounding is undone.

    Args:
        model: best one whose batch norms are folded, since they stand between the layers; left as
            it was. It is read in eval mode.
        example_inputs: as for :func:`normwise.fold`.

    Returns:
        Result: ``model``, a copy in eval mode, and ``report``, an :class:`EqualizeReport`.

    Raises:
        InputError: if the model has no convolution or linear layer, does not run on the example
            inputs, or cannot be copied.

    Example:
        >>> import torch, normwise as nw
        >>> from normwise import equalize
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(16, 4)
        >>> level, report = equalize(net, x)
        >>> report["0"].action, report["0"].into, report["2"].reason
        ('equalized', '2', 'is-output')
        >>> torch.allclose(level(x), net(x), atol=1e-6)
        True
    """
    call = Call.of(example_inputs)
    traced = copy_of(model).eval()
    with on_examples(), same_random_numbers():
        trace = record(traced, call)
    pairs = _Pairs(traced, trace)
    if not pairs.takers:
        raise InputError(
            message(
                "equalize takes a model with convolutions or linear layers",
                f"{type(model).__name__} without one whose weight is a parameter",
                "a model of torch.nn's layers",
            )
        )
    # One entry a layer: one that is called twice has no partner, at no call.
    layers = {pairs.name(taker): taker for taker in pairs.takers.values()}
    forbidden: set[str] = set()
    while True:
        found = {name: _partner(pairs, taker, forbidden) for name, taker in layers.items()}
        made = {name: p for name, p in found.items() if isinstance(p, _Pair)}
        plain, weights = Weights(), Weights()
        for _ in range(SWEEPS):
            moved = (_level(p, weights, pairs.border(p.first)) for p in made.values())
            if max(moved, default=0.0) < STILL:
                break
        edits = _edits(weights, pairs.around)
        verdict = _prove(model, call, edits, {n: pairs.name(p.second) for n, p in made.items()})
        if verdict.passed or not made:
            break
        forbidden |= {verdict.first_wrong() or next(reversed(made))}
    entries = []
    for name, pair in found.items():
        if isinstance(pair, Refusal):
            entries.append(Entry(name, "left", None, pair.reason, {"detail": str(pair)}))
            continue
        before, after = _ranges(pair, plain), _ranges(pair, weights)
        facts: dict[str, Any] = {
            "spread": (_spread(before[0]), _spread(after[0])),
            "spread_next": (_spread(before[1]), _spread(after[1])),
            "factor": (float(pair.total.max()), float(pair.total.min())),
        }
        if name in verdict.layers:
            check = verdict.layers[name]
            facts |= {"error": check.folded, "error64": check.exact}
        entries.append(Entry(name, "equalized", pairs.name(pair.second), None, facts))
    whole = {"error": verdict.whole.folded, "error64": verdict.whole.exact}
    result = apply(edits, copy_of(model).eval())
    return Result(result, EqualizeReport(entries, whole))  # type: ignore[arg-type] # a copy of model


def _prove(model: nn.Module, call: Call, edits: Edits, seconds: dict[str, str]) -> verify.Verdict:
    """The second layer of each pair must give what it gave."""

    def fresh() -> nn.Module:
        return copy_of(model).eval()

    # What a second layer gives is divided in its turn where it is the first of another pair.
    watches = [
        verify.Watch(name, (path,) if path and path not in seconds else ())
        for name, path in seconds.items()
    ]
    paths = [p for w in watches for p in w.paths]
    truth = verify.exact_outputs(fresh(), call, paths)
    original = verify.run(fresh(), call, paths)
    changed = apply(edits, fresh())
    return verify.compare(watches, truth, original, changed, apply(edits, fresh().double()), call)
