"""Whether a folded model is the original: layer by layer and end to end, in float64 and as it is.

In float64 the two must agree to the last digits: that proves the algebra. In the model's own dtype
neither is exact, so both are held against the float64 result: the folded model may be off by no
more than a few times what the original is off by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from normwise.graph.run import Call, same_random_numbers, tensors_in

__all__ = ["Check", "Verdict", "Watch", "compare", "distance"]

# What float64 leaves of two different orders of the same sums; measured: 1e-15 to 1e-13 on
# networks of 5 to 160 layers.
EXACT = 1e-10
# How many times the original's own error a folded model's may be, and how many units of rounding
# (eps of the dtype, at the scale of the tensor) are no error at all.
FACTOR, UNITS = 8.0, 16.0


@dataclass(frozen=True)
class Watch:
    """A norm, and the modules whose outputs show whether it was folded right."""

    name: str
    paths: tuple[str, ...]


@dataclass
class Check:
    """How far off an output is, relative to its largest value."""

    exact: float | None = None
    """Between original and folded in float64; None if the model does not run in float64."""
    folded: float = 0.0
    """Of the folded model in its own dtype, against float64."""
    original: float = 0.0
    allowed: float = 0.0
    rounding: float = EXACT
    """What ``exact`` may be: more where the model's code rounds the output to another dtype."""

    @property
    def passed(self) -> bool:
        return (self.exact is None or self.exact <= self.rounding) and self.folded <= self.allowed

    def __str__(self) -> str:
        exact = "" if self.exact is None else f", and by {self.exact:.1e} in float64"
        return (
            f"off by {self.folded:.1e} of the largest value where {self.allowed:.1e} is allowed"
            f"{exact}"
        )


@dataclass
class Verdict:
    layers: dict[str, Check] = field(default_factory=dict)
    whole: Check = field(default_factory=Check)
    error: Exception | None = None
    """The folded model did not run."""

    @property
    def passed(self) -> bool:
        return (
            self.error is None and self.whole.passed and all(c.passed for c in self.layers.values())
        )

    def first_wrong(self) -> str | None:
        return next((name for name, c in self.layers.items() if not c.passed), None)


Outputs = dict[str, list[Tensor]]
WHOLE = ""


@contextlib.contextmanager
def _captured(model: nn.Module, paths: Sequence[str], into: Outputs) -> Iterator[None]:
    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = tensors_in(output)
            # Inside vmap a tensor is no tensor outside of it.
            found = [t for t in found[:1] if not is_functorch_wrapped_tensor(t)]
            into.setdefault(path, []).extend(t.detach().clone() for t in found)

        return hook

    handles = [model.get_submodule(p).register_forward_hook(keep(p)) for p in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, call: Call, paths: Sequence[str]) -> Outputs:
    """The outputs of the modules at ``paths``, call after call, and of the model under ``''``."""
    outputs: Outputs = {}
    inner = sorted({p for p in paths if p})
    with torch.no_grad(), same_random_numbers(), _captured(model, inner, outputs):
        result = call.copy().run(model)
    outputs[WHOLE] = [t.detach() for t in tensors_in(result)]
    return outputs


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of the tensor; inf if shapes differ or
    one is not finite where the other is."""
    if len(a) != len(b):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if x.numel() == 0:
            continue
        if not x.is_floating_point():
            if not torch.equal(x, y.to(x.dtype)):
                return float("inf")
            continue
        p, q = x.double(), y.double()
        finite = torch.isfinite(q)
        if not torch.equal(p[~finite].nan_to_num(), q[~finite].nan_to_num()):
            return float("inf")
        if not bool(finite.any()):
            continue
        size = float(q[finite].abs().max()) or 1.0
        gap = float((p[finite] - q[finite]).abs().max()) / size
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def _eps(tensors: list[Tensor]) -> float:
    return max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=0.0)


def _check(
    path: str, truth: Outputs | None, exact: Outputs | None, original: Outputs, folded: Outputs
) -> Check:
    o, f = original.get(path, []), folded.get(path, [])
    unit = UNITS * _eps(o)
    if truth is None or exact is None or path not in truth:
        return Check(None, distance(f, o), 0.0, 2 * unit)
    t = truth[path]
    off = distance(o, t)
    return Check(
        distance(exact.get(path, []), t),
        distance(f, t),
        off,
        FACTOR * off + unit,
        max(EXACT, UNITS * _eps(t)),
    )


def _worst(checks: list[Check]) -> Check:
    return max(checks, key=lambda c: (not c.passed, c.folded))


def exact_outputs(model: nn.Module, call: Call, paths: Sequence[str]) -> Outputs | None:
    """In float64, or None where the model does not run in it."""
    try:
        return run(model.double(), call.to(torch.float64), paths)
    except Exception:
        # Its code fixes a dtype; that is no fault of the fold.
        return None


def compare(
    watches: Sequence[Watch],
    truth: Outputs | None,
    original: Outputs,
    folded: nn.Module,
    exact_folded: nn.Module,
    call: Call,
) -> Verdict:
    """Hold a folded model against the original's outputs."""
    verdict = Verdict()
    paths = [p for w in watches for p in w.paths]
    try:
        outputs = run(folded, call, paths)
        exact = None if truth is None else run(exact_folded, call.to(torch.float64), paths)
    except Exception as error:
        verdict.error = error
        return verdict
    for watch in watches:
        if watch.paths:
            checks = [_check(p, truth, exact, original, outputs) for p in watch.paths]
            verdict.layers[watch.name] = _worst(checks)
    verdict.whole = _check(WHOLE, truth, exact, original, outputs)
    return verdict
