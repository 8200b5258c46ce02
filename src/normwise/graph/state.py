"""What is known while a plan is made, and what has been decided so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normwise.graph import rules
from normwise.graph.absorb import Taker, Weights, taker_of
from normwise.graph.norms import Norm, Site, find_norms, replaceable
from normwise.graph.reasons import Refusal
from normwise.graph.record import Node, Trace, Value
from normwise.graph.surroundings import Surroundings, has_hooks

__all__ = ["AnyTaker", "Fate", "NormTaker", "State"]


@dataclass
class Fate:
    """What becomes of a norm. action: 'folded', 'merged', 'multiply-add' or 'left'."""

    action: str
    direction: str = ""
    into: tuple[str, ...] = ()
    reason: str | None = None
    detail: str = ""
    through: tuple[str, ...] = ()
    """Norms that went up before, and that it passed on its way up."""


@dataclass(eq=False)
class NormTaker:
    """A norm that became a multiply-add, as one that can take up another norm."""

    norm: Norm
    site: Site

    @property
    def node(self) -> Node:
        return self.site.node

    @property
    def y(self) -> Value:
        return self.site.y

    @property
    def x(self) -> tuple[Value, ...]:
        return (self.site.x,)

    @property
    def output_axis(self) -> int:
        return self.site.axis

    def input_axis(self, x: Value) -> int:
        return self.site.axis

    @property
    def takes_shift(self) -> bool:
        return True

    @property
    def key(self) -> int:
        """The same for all calls with the same weights."""
        return id(self.norm)

    def owner(self, direction: str) -> nn.Module | None:
        return self.norm.module


AnyTaker = Taker | NormTaker


class State:
    """The trace, and the decisions: ``fates``, and what follows from them in float64, ``weights``
    and ``affine`` (scale and shift of the norms that become multiply-adds)."""

    def __init__(
        self, model: nn.Module, trace: Trace, forbidden: Mapping[tuple[str, str], str]
    ) -> None:
        self.trace = trace
        self.forbidden = forbidden
        self.around = Surroundings(model, trace)
        self.norms = find_norms(model, trace, self.around.path_of)
        self.site_of = {s.node: (n, s) for n in self.norms for s in n.sites}
        self.order = {node: i for i, node in enumerate(trace.nodes)}
        self.weights = Weights()
        self.affine: dict[Norm, tuple[Tensor, Tensor]] = {}
        self.fates: dict[Norm, Fate] = {}
        self._takers: dict[Node, Taker | None] = {}

    def in_order(self, nodes: Iterable[Node]) -> list[Node]:
        return sorted(nodes, key=self.order.__getitem__)

    def taker(self, node: Node) -> Taker | None:
        if node not in self._takers:
            self._takers[node] = taker_of(node, self.around.owners)
        return self._takers[node]

    def run(self, node: Node, values: dict[Value, Tensor]) -> list[Tensor] | None:
        """:func:`rules.run`, for norms that went somewhere too: they hand their input through."""
        if node not in self.site_of:
            return rules.run(node, values)
        _, site = self.site_of[node]
        total: Tensor = torch.zeros((), dtype=torch.float64).expand(site.x.shape)
        for v in (site.x, site.residual):
            if v is not None and v in values:
                total = total + values[v]
        return [total]

    def why_not(self, node: Node, value: Value) -> Refusal:
        weight = rules.argument(node, 1, "weight")
        if node.name.startswith(("conv", "linear", "embedding")) and isinstance(weight, Value):
            if weight.tensor is None:
                return Refusal("parametrized" if weight.origin == "call" else "not-a-parameter")
            if len(self.around.owners(weight.tensor)) > 1:
                return Refusal("shared-weight")
        return Refusal("blocked", f"by {node.name}")

    # -- conditions -------------------------------------------------------------------------------

    def check_norm(self, norm: Norm) -> None:
        sites = norm.sites
        if norm.module is not None and has_hooks(norm.module):
            raise Refusal("hook", "on the norm itself")
        if getattr(norm.module, "domains", None) is not None:
            raise Refusal("custom-forward", "it keeps running statistics of several domains")
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
            if 0 in s.x.shape:
                raise Refusal("not-reached", "it was given no elements")

    def check_replaceable(self, norm: Norm) -> None:
        """The norm itself may go: nobody else uses its tensors."""
        nodes = [s.node for s in norm.sites]
        if replaceable(norm):
            for t in norm.tensors():
                if not all(u in nodes or self._of_another(t, u) for u in self._users(t)):
                    raise Refusal("used-elsewhere", "its own parameters or buffers")
        else:
            if norm.sites[0].eps > 0.5:
                raise Refusal("functional", "eps leaves no variance that makes it change nothing")
            self.around.check_own(norm.tensors(), nodes)

    def _users(self, t: Tensor) -> list[Node]:
        return self.trace.uses.get(id(t), [])

    def _of_another(self, t: Tensor, node: Node) -> bool:
        """``node`` is a call of another norm module, which holds ``t`` too."""
        other, _ = self.site_of.get(node, (None, None))
        return other is not None and any(m is other.module for m, _ in self.around.owners(t))

    def check_calls(self, norm: Norm, nodes: Sequence[Node]) -> None:
        """All calls of ``norm`` are among ``nodes``."""
        if any(s.node not in nodes for s in norm.sites):
            raise Refusal("shared-weight", f"{norm.name} is called elsewhere too")

    def check_memory(self, norm: Norm) -> None:
        """Where the norm stood, input and output will be one tensor: no writes to either, unless
        nobody but the norm reads the input."""
        for s in norm.sites:
            alone = s.x.origin == "call" and s.x.readers == [s.node] and not s.x.kept
            if not alone and {s.x.storage, s.y.storage} & self.trace.written:
                raise Refusal("in-place")

    def check_place(
        self,
        direction: str,
        norm: Norm,
        takers: Sequence[AnyTaker],
        region: Sequence[Node],
        changed: Iterable[Value],
    ) -> None:
        """No hook sees the change, no other way through the code leads past it, and nothing writes
        to memory that would now be shared."""
        owners = [o for t in takers if (o := t.owner(direction)) is not None]
        nodes = [*region, *(t.node for t in takers), *(s.node for s in norm.sites)]
        self.around.check_hooks(owners, changed)
        self.around.check_static(nodes, owners)
        self.check_memory(norm)

    def gone(self, direction: str, takers: Sequence[AnyTaker], region: Sequence[Node]) -> Fate:
        """The fate of a norm that ``takers`` took up, at the ends of ``region``."""
        into = []
        for taker in takers:
            if isinstance(taker, NormTaker):
                into.append(taker.norm.name)
            else:
                into.append(self.around.path_of(taker.owner(direction)))
        merged = all(isinstance(t, NormTaker) for t in takers)
        action = "merged" if merged else "folded"
        through = tuple(self.site_of[n][0].name for n in region if n in self.site_of)
        return Fate(action, direction, tuple(dict.fromkeys(into)), through=through)
