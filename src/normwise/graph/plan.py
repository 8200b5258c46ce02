"""Which batch norm goes where: up into what makes its input, down into what reads its output.

In eval a batch norm is y = a * x + b for each channel. A norm goes *up* if everything whose result
reaches it can give a * x + b instead of x, and nobody else sees the difference; *down* if everybody
who reads its output can read x instead. What is between must commute (:mod:`rules`); who is reached
by which channel is found with labels (:mod:`labels`). What goes nowhere becomes one multiply-add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normwise.graph.absorb import Weights
from normwise.graph.downward import Downward
from normwise.graph.labels import Mixed
from normwise.graph.norms import Norm, replaceable
from normwise.graph.reasons import Refusal
from normwise.graph.record import Trace
from normwise.graph.state import Fate, State
from normwise.graph.surroundings import Surroundings
from normwise.graph.upward import Upward

__all__ = ["Plan", "make_plan"]


@dataclass
class Plan:
    """What is to change, on the model of the trace."""

    norms: list[Norm]
    fates: dict[Norm, Fate]
    weights: Weights
    affine: dict[Norm, tuple[Tensor, Tensor]]
    surroundings: Surroundings


def make_plan(
    model: nn.Module, trace: Trace, forbidden: Mapping[tuple[str, str], str] | None = None
) -> Plan:
    """The fate of each norm of ``model``, in the order in which they run.

    forbidden: (name, 'up' | 'down' | 'stay') that were tried and came out wrong -> how wrong.
    """
    state = State(model, trace, forbidden or {})
    for norm in state.norms:
        state.fates[norm] = _fate(state, norm)
    return Plan(state.norms, state.fates, state.weights, state.affine, state.around)


def _fate(state: State, norm: Norm) -> Fate:
    try:
        state.check_norm(norm)
    except Refusal as refusal:
        return Fate("left", reason=refusal.reason, detail=refusal.detail)
    a, b = state.affine.setdefault(norm, norm.affine())
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return Fate("left", reason="not-finite")
    refusals: list[Refusal] = []
    for direction, way in (("up", Upward), ("down", Downward)):
        if (norm.name, direction) in state.forbidden:
            refusals.append(Refusal("differs", state.forbidden[norm.name, direction]))
            continue
        try:
            return way(state, norm).go(a, b)
        except Mixed:
            refusals.append(Refusal("channels-differ"))
        except Refusal as refusal:
            refusals.append(refusal)
    return _stay(state, norm, *refusals)


def _stay(state: State, norm: Norm, up: Refusal, down: Refusal) -> Fate:
    """A multiply-add, where a module can stand for the norm. Why the norm went nowhere: upward is
    where it belongs, unless nothing is there."""
    reason = (down if up.reason == "no-neighbour" else up).reason
    both = f"up: {up}; down: {down}"
    if not replaceable(norm):
        return Fate("left", reason="custom-forward" if norm.module else reason, detail=both)
    if (norm.name, "stay") in state.forbidden:
        return Fate("left", reason="differs", detail=both)
    try:
        state.check_replaceable(norm)
    except Refusal as refusal:
        return Fate("left", reason=refusal.reason, detail=refusal.detail)
    return Fate("multiply-add", reason=reason, detail=both)
