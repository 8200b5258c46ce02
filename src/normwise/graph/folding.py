"""``fold``: the same model without its batch norms, and proof of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from normwise.errors import InputError, message
from normwise.graph import measure, verify
from normwise.graph.edits import Edits, apply, edits_of
from normwise.graph.norms import Norm, is_norm
from normwise.graph.plan import Plan, make_plan
from normwise.graph.record import record
from normwise.graph.report import FoldReport
from normwise.graph.run import Call, copy_of, on_examples, same_random_numbers
from normwise.results import Entry, Result

__all__ = ["FoldResult", "fold"]

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from normwise.graph.exporting import OnnxFile

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class FoldResult(Result[M, FoldReport]):
    """``result.model``, ``result.report``; unpacks as ``model, report``. Saves the model too."""

    structure: dict[str, Any] = field(default_factory=dict, repr=False)
    """What changed besides numbers: :meth:`normwise.graph.edits.Edits.structure`."""
    call: Call | None = field(default=None, repr=False)
    """The example inputs."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """The folded weights and structure as one safetensors file; :func:`load_folded` reads it.

        See :mod:`normwise.graph.saving`. Needs the package safetensors.
        """
        from normwise.graph.saving import save_folded

        save_folded(self.model, self.structure, path)

    def export(self, example_inputs: Any = None) -> ExportedProgram:
        """The folded model as a ``torch.export`` program, for any batch size where it can be.

        Args:
            example_inputs: as in :func:`fold`; those of the fold if None.

        Raises:
            InputError: if ``torch.export`` cannot trace the model, or what it made differs.
        """
        from normwise.graph.exporting import export_program

        return export_program(self.model, self._call(example_inputs))

    def save_program(self, path: str | os.PathLike[str], example_inputs: Any = None) -> None:
        """:meth:`export` to a file that ``torch.export.load`` reads without the model's code."""
        from normwise.graph.exporting import save_program

        save_program(self.export(example_inputs), path)

    def to_onnx(self, path: str | os.PathLike[str], example_inputs: Any = None) -> OnnxFile:
        """The folded model as an ONNX file, for any batch size where it can be.

        Needs the packages onnx and onnxscript. With onnxruntime the file is run before it is
        written: an output that is off by more than 1e-4 of its largest value is an error.

        Args:
            path: where to write; the file is whole or is not there.
            example_inputs: as in :func:`fold`; those of the fold if None.

        Returns:
            OnnxFile: whether the batch is free, the batch norms left, and the error of the outputs
            (None where onnxruntime is not installed and nothing was verified).

        Raises:
            InputError: if the model cannot be exported, a folded batch norm is in the file, or
                onnxruntime computes something else.
        """
        from normwise.graph.exporting import to_onnx

        # A norm that is written as a function call stays one, though it changes nothing.
        whole = all(e.action != "left" for e in self.report) and not self.structure["neutral"]
        return to_onnx(self.model, self._call(example_inputs), path, whole)

    def _call(self, example_inputs: Any) -> Call:
        if example_inputs is not None:
            return Call.of(example_inputs)
        assert self.call is not None
        return self.call


class _Folder:
    """One model, folded as far as the proof holds."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model = model
        self.call = call
        self.traced = copy_of(model).eval() if model.training else copy_of(model)
        with on_examples(), same_random_numbers():
            self.trace = record(self.traced, call)
        self.forbidden: dict[tuple[str, str], str] = {}

    def fresh(self) -> nn.Module:
        copy = copy_of(self.model)
        return copy.eval() if self.model.training else copy

    def plan(self, without: Iterable[tuple[str, str]] = ()) -> Plan:
        return make_plan(self.traced, self.trace, self.forbidden | dict.fromkeys(without, ""))

    def watches(self, plan: Plan) -> list[verify.Watch]:
        """Where each fold shows: at the norm's own output, unless a later norm went up through it
        or into it; for a norm that went down at the output of who took it. Where those took up
        another norm too: where that one shows."""
        by_name = {n.name: n for n in plan.norms}
        above = {
            path: n
            for n in plan.norms
            if plan.fates[n].direction == "up"
            for path in plan.fates[n].into
        }

        later = {
            name: n
            for n in plan.norms
            if plan.fates[n].direction == "up"
            for name in (*plan.fates[n].through, *plan.fates[n].into)
        }

        def shows(norm: Norm) -> list[str]:
            fate = plan.fates[norm]
            if norm.name in later:
                return shows(later[norm.name])
            if fate.direction != "down":
                return [] if norm.module is None else [norm.name]
            paths = []
            for path in fate.into:
                inner = (n for p, n in above.items() if p == path or p.startswith(path + "."))
                further = by_name.get(path) or next(inner, None)
                paths += [path] if further is None else shows(further)
            return [p for p in paths if p]

        changed = [n for n in plan.norms if plan.fates[n].action != "left"]
        return [verify.Watch(n.name, tuple(shows(n))) for n in changed]

    def prove(self, plan: Plan, edits: Edits) -> verify.Verdict:
        watches = self.watches(plan)
        paths = [p for w in watches for p in w.paths]
        truth = verify.exact_outputs(self.fresh(), self.call, paths)
        original = verify.run(self.fresh(), self.call, paths)
        folded = apply(edits, self.fresh())
        exact = apply(edits, self.fresh().double())
        return verify.compare(watches, truth, original, folded, exact, self.call)

    def run(self) -> tuple[Plan, Edits, verify.Verdict]:
        """The plan that holds; what came out wrong is forbidden and planned again."""
        while True:
            plan = self.plan()
            edits = edits_of(plan)
            verdict = self.prove(plan, edits)
            changed = any(fate.action != "left" for fate in plan.fates.values())
            # A model that gives other numbers each time differs from itself, unfolded too.
            if verdict.passed or not changed:
                return plan, edits, verdict
            name = verdict.first_wrong() or self.culprit(plan)
            self.forbid(plan, name, verdict)

    def forbid(self, plan: Plan, name: str, verdict: verify.Verdict) -> None:
        fate = next(plan.fates[n] for n in plan.norms if n.name == name)
        step = (name, fate.direction or "stay")
        assert step not in self.forbidden
        if verdict.error is not None:
            self.forbidden[step] = f"{type(verdict.error).__name__}: {verdict.error}"
        else:
            self.forbidden[step] = str(verdict.layers.get(name, verdict.whole))

    def culprit(self, plan: Plan) -> str:
        """The norm with which a model first goes wrong as a whole: by bisection, n norms folded."""
        changed = [n for n in plan.norms if plan.fates[n].action != "left"]
        low, high = 0, len(changed)
        while high - low > 1:
            middle = (low + high) // 2
            rest: set[tuple[str, str]] = set()
            for norm in changed[middle:]:
                rest |= {(norm.name, d) for d in ("up", "down", "stay")}
            part = self.plan(rest)
            if self.prove(part, edits_of(part)).passed:
                low = middle
            else:
                high = middle
        return changed[high - 1].name


def _entry(norm: Norm, plan: Plan, verdict: verify.Verdict) -> Entry:
    fate = plan.fates[norm]
    check = verdict.layers.get(norm.name)
    facts: dict[str, Any] = {"direction": fate.direction or None, "detail": fate.detail or None}
    if check is not None:
        facts |= {"error": check.folded, "error64": check.exact}
    return Entry(norm.name, fate.action, ", ".join(fate.into) or None, fate.reason, facts)


def _entries(model: nn.Module, plan: Plan, verdict: verify.Verdict) -> list[Entry]:
    entries = [_entry(norm, plan, verdict) for norm in plan.norms]
    seen = {e.name for e in entries}
    for path, module in model.named_modules():
        if path in seen:
            continue
        if is_norm(module):
            entries.append(Entry(path, "left", reason="not-reached"))
        elif "BatchNorm" in str(getattr(module, "original_name", "")):
            entries.append(Entry(path, "left", reason="scripted"))
    return entries


def fold(
    model: M, example_inputs: Any, *, inplace: bool = False, seconds: float = 0.5
) -> FoldResult[M]:
    r"""Fold the batch norms of a model in eval mode into the layers around them.

    In eval a batch norm is :math:`y = a_c x + b_c` for each channel, with
    :math:`a = \gamma / \sqrt{\sigma^2 + \epsilon}` and :math:`b = \beta - a \mu`, and two linear
    maps in a row are one (Jacob et al. 2018, section 3.2). A norm goes *up* into the convolutions,
    linear layers, embeddings, attention projections or norms that make its input, or *down* into
    those that read its output, through whatever commutes between: pooling, reshaping,
    concatenation, slicing, channel shuffles, upsampling, addition. A zero-padded convolution after
    a norm keeps what the shift gives to its border. What goes nowhere becomes one multiply-add.

    The model is run once and recorded; norms that are written as function calls are found too.
    Every fold is then verified, layer by layer and end to end, in float64 and in the model's dtype;
    one that differs beyond rounding is undone and reported.

    Args:
        model: any module; it is left as it was. One in training mode is folded as in eval mode;
            a norm that was left in training mode inside a model in eval mode stays.
        example_inputs: what the model is called with: a tensor, a tuple of positional arguments or
            a dict of keyword arguments. The fold holds for inputs that take the same way through
            the code; where the code asks for values of tensors, the norms around stay.
        inplace: change ``model`` itself.
        seconds: how long to measure the latency before and after, about; 0 for not at all.

    Returns:
        FoldResult: ``model``, of the same class as before (trainable, scriptable, exportable), in
        eval mode; and ``report``, a :class:`FoldReport`. Unpacks as ``model, report``.

    Raises:
        InputError: if the model has no batch norm, does not run on the example inputs, or cannot be
            copied.

    Example:
        >>> import torch, normwise as nw
        >>> from normwise import fold
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        ... ).eval()
        >>> x = torch.randn(2, 3, 9, 9)
        >>> folded, report = fold(net, x, seconds=0)
        >>> folded[1], report["1"].action, report["1"].into
        (Identity(), 'folded', '0')
        >>> torch.allclose(folded(x), net(x), atol=1e-5)
        True
    """
    call = Call.of(example_inputs)
    folder = _Folder(model, call)
    plan, edits, verdict = folder.run()
    entries = _entries(folder.traced, plan, verdict)
    if not entries:
        raise InputError(
            message(
                "fold takes a model with batch norms",
                f"{type(model).__name__} without one",
                "normwise.nn or torch.nn batch norms; other norms average over their input and "
                "cannot be folded",
            )
        )
    before = folder.fresh()
    if inplace and model.training:
        model.eval()
    after = apply(edits, model if inplace else folder.fresh())
    facts: dict[str, Any] = {
        "found": len(entries),
        "parameters": (measure.size(before), measure.size(after)),
        "error": verdict.whole.folded,
        "error64": verdict.whole.exact,
    }
    per_call = {n: sum(_numel(s.y.shape) for s in n.sites) for n in plan.norms}
    kept = sum(v for n, v in per_call.items() if plan.fates[n].action in ("multiply-add", "left"))
    facts["multiply_adds"] = (
        measure.multiply_adds(before, call) + sum(per_call.values()),
        measure.multiply_adds(after, call) + kept,
    )
    if seconds > 0:
        facts["latency_ms"] = measure.latency(before, after, call, seconds)
    report = FoldReport(entries, facts)
    return FoldResult(after, report, edits.structure(), call)  # type: ignore[arg-type] # M before and after


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
