"""``repair``: the edits that findings carry, applied to a model or to a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normwise.doctor.finding import Finding, Repair
from normwise.doctor.main import Checkpoint, check
from normwise.doctor.report import CheckReport
from normwise.errors import InputError, message
from normwise.graph.run import copy_of
from normwise.results import Entry, Report, Result
from normwise.tools.norms import core
from normwise.tools.recalibrate import recalibrate

__all__ = ["RepairReport", "repair"]


class RepairReport(Report):
    """What became of each finding: an entry each, in their order.

    An entry has the layer as ``name``; ``action``, 'fixed' or 'left'; as ``reason`` the rule and,
    for those left, why; in ``facts`` the code, and what was done.
    """

    title: ClassVar[str] = "repair"
    columns: ClassVar[tuple[str, ...]] = ("does",)

    @property
    def fixed(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.action == "fixed")

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.action == "left")

    def summary(self) -> list[str]:
        lines = [f"{len(self.fixed)} fixed, {len(self.left)} left"]
        output = self.facts.get("output")
        return lines if output is None else [*lines, f"written to {output}"]


def repair(
    model_or_checkpoint: nn.Module | Checkpoint,
    report: CheckReport | Iterable[Finding] | None = None,
    *,
    unsafe: bool = False,
    data: Any = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batches: int | None = None,
    output: str | os.PathLike[str] | None = None,
    inplace: bool = False,
) -> Result[Any, RepairReport]:
    """Applies the edits that take findings away, those that are safe, and says what it left.

    A safe edit leaves what the model computes on every input on which it computed anything
    sensible. Others (``unsafe=True``) change outputs, or the course of further training.

    Args:
        model_or_checkpoint: as for :func:`normwise.check`: a module, a state dict, or the path of a
            safetensors file or one of ``torch.save``.
        report: what ``check`` gave for it, or some of its findings; None: it is checked first.
        unsafe: apply edits that are not safe, too.
        data: batches, for findings whose statistics are taken anew: as for
            :func:`normwise.recalibrate`, which does it, in the layers concerned. Without data
            these are left.
        forward, batches: as for ``recalibrate``.
        output: for a path: where the repaired checkpoint goes, in the same format, all at once;
            what no edit touches is the same, byte for byte in safetensors. May be the path itself.
        inplace: change the model, or the tensors of the state dict, instead of a copy.

    Returns:
        Result: ``.model``, the repaired model or state dict, or the path ``output``; ``.report``, a
        :class:`RepairReport`. Unpacks as ``model, report``.

    Raises:
        InputError: a path without ``output`` or in a format that cannot be written; data for a
            checkpoint; a model that cannot be copied.
        Errors of ``check`` and ``recalibrate``: the model is then as it was, in place too.

    Example:
        >>> import torch, normwise as nw
        >>> bn = torch.nn.BatchNorm1d(2, momentum=0.99)
        >>> model, report = nw.repair(bn, unsafe=True)
        >>> model.momentum, report.fixed[0].reason
        (0.01, 'NW107 foreign-momentum')
    """
    is_model = isinstance(model_or_checkpoint, nn.Module)
    is_path = isinstance(model_or_checkpoint, (str, os.PathLike))
    if is_path != (output is not None):
        raise InputError(
            message(
                "output= names where the repaired checkpoint goes, and goes with the path of one",
                "a path without it" if is_path else f"a {type(model_or_checkpoint).__name__}",
                "nw.repair('model.safetensors', output='repaired.safetensors')",
            )
        )
    if data is not None and not is_model:
        raise InputError(
            message(
                "data run through a model",
                "data for a checkpoint without code",
                "the model with the checkpoint's weights loaded",
            )
        )
    if report is None:
        report = check(model_or_checkpoint, data, forward=forward)
    found = report.findings if isinstance(report, CheckReport) else tuple(report)
    plan = _Plan(unsafe, is_model, data is not None)
    if isinstance(model_or_checkpoint, nn.Module):
        inner = core(model_or_checkpoint)
        working = inner if inplace else copy_of(inner)
        names = dict(working.named_modules())
        plan.make(
            found,
            lambda layer, tensor: _has(names.get(layer), tensor),
            lambda layer: _renewable(names.get(layer)),
        )
        _edit(working, plan, data, forward, batches)
        repaired: Any = model_or_checkpoint if inplace else working
    elif isinstance(model_or_checkpoint, Mapping):
        repaired = _state_dict(model_or_checkpoint, found, plan, inplace)
    else:
        assert output is not None
        repaired = _file(model_or_checkpoint, output, found, plan)
    facts: dict[str, Any] = {"fixed": len(plan.applied), "left": len(found) - len(plan.applied)}
    if output is not None:
        facts["output"] = os.fspath(output)
    return Result(repaired, RepairReport(plan.entries, facts))


def _has(module: nn.Module | None, name: str | None) -> bool:
    """Whether there is the module, and in it this tensor: one that it holds, not one that a
    parametrization computes."""
    if module is None or name is None:
        return module is not None
    return module._parameters.get(name) is not None or module._buffers.get(name) is not None


def _renewable(module: nn.Module | None) -> bool:
    """Whether ``recalibrate`` takes the layer."""
    if not isinstance(module, _BatchNorm) or not module.track_running_stats:
        return False
    return module.running_mean is not None and module.running_var is not None


class _Plan:
    """Which edits are made, and why others are not."""

    def __init__(self, unsafe: bool, is_model: bool, has_data: bool) -> None:
        self.unsafe, self.is_model, self.has_data = unsafe, is_model, has_data
        self.applied: list[tuple[str, Repair]] = []
        self.entries: list[Entry] = []
        self._touched: set[tuple[str, str]] = set()

    def make(
        self,
        findings: Iterable[Finding],
        has: Callable[[str, str | None], bool],
        renewable: Callable[[str], bool] = lambda layer: False,
    ) -> None:
        """``has(layer, tensor)`` says whether there is such a layer, with such a tensor;
        ``renewable(layer)`` whether its statistics can be taken anew."""
        for one in findings:
            rule = f"{one.code} {one.rule}"
            why = self._obstacle(one, has, renewable)
            facts = {"code": one.code, "severity": one.severity}
            if why is None:
                assert one.repair is not None
                self.applied.append((one.layer, one.repair))
                self._touched |= self._touches(one.layer, one.repair)
                facts["does"] = one.repair.does
            self.entries.append(
                Entry(
                    one.layer,
                    "left" if why else "fixed",
                    reason=f"{rule}: {why}" if why else rule,
                    facts=facts,
                )
            )

    @staticmethod
    def _touches(layer: str, edit: Repair) -> set[tuple[str, str]]:
        return {(layer, name) for name in (*edit.tensors, *edit.attributes)}

    def _obstacle(
        self,
        one: Finding,
        has: Callable[[str, str | None], bool],
        renewable: Callable[[str], bool],
    ) -> str | None:
        edit = one.repair
        if edit is None:
            return f"no edit takes it away: {one.remedy}"
        if not edit.safe and not self.unsafe:
            return f"the fix is unsafe ({edit.does}): unsafe=True"
        if edit.recalibrate and not self.is_model:
            return "statistics are taken anew from data, which needs the model"
        if edit.recalibrate and not self.has_data:
            return "statistics are taken anew from data: data="
        if edit.attributes and not self.is_model:
            return "it is an attribute of the module, which a checkpoint does not hold"
        if not (has(one.layer, None) and all(has(one.layer, name) for name in edit.tensors)):
            return "there is no such layer, or it does not hold the tensors: check again"
        if edit.recalibrate and not renewable(one.layer):
            return "its statistics are constants or not tracked: load them anew"
        anew = any(at == one.layer and e.recalibrate for at, e in self.applied)
        statistics = {(one.layer, "running_mean"), (one.layer, "running_var")}
        clash = self._touched & self._touches(one.layer, edit)
        if edit.recalibrate:
            clash |= self._touched & statistics
        elif anew:
            clash |= statistics & self._touches(one.layer, edit)
        return "another fix changed the same: check again" if clash else None

    def tensors(self) -> dict[tuple[str, str], Tensor]:
        """By layer and name, for a checkpoint."""
        return {
            (layer, name): value
            for layer, edit in self.applied
            for name, value in edit.tensors.items()
        }


def _edit(
    model: nn.Module,
    plan: _Plan,
    data: Any,
    forward: Callable[[nn.Module, Any], Any] | None,
    batches: int | None,
) -> None:
    """All edits or none: edits of values first, since later layers see them, then statistics, then
    what goes with these."""
    undo: list[Callable[[], object]] = []
    try:
        for layer, edit in plan.applied:
            if not edit.recalibrate:
                _set(model.get_submodule(layer), edit, undo)
        anew = [(layer, edit) for layer, edit in plan.applied if edit.recalibrate]
        if anew:
            layers: list[Any] = [model.get_submodule(layer) for layer in dict(anew)]
            counts = [(m, int(m.num_batches_tracked)) for m in layers if _counted(m)]
            done = recalibrate(
                model, data, forward=forward, batches=batches, layers=layers,
                progress=False, inplace=True,
            )  # fmt: skip
            undo.append(done.undo)
            # Batches that were pooled are no steps of an exponential average, whose count is to
            # say how much of the initial values is left (NW108). A plain average goes on from it.
            for module, count in counts:
                module.num_batches_tracked.fill_(max(count, int(module.num_batches_tracked)))
        for layer, edit in anew:
            _set(model.get_submodule(layer), edit, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _counted(module: Any) -> bool:
    return module.momentum is not None and module.num_batches_tracked is not None


def _set(module: nn.Module, edit: Repair, undo: list[Callable[[], object]]) -> None:
    for name, value in edit.attributes.items():
        undo.append(_back(module, name, getattr(module, name)))
        setattr(module, name, value)
    for name, value in edit.tensors.items():
        own: Tensor = getattr(module, name)
        new = value.to(own.device)
        if own.dtype == new.dtype and own.shape == new.shape:
            undo.append(_filled(own, own.detach().clone()))
            _filled(own, new)()
            continue
        held: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        undo.append(_held(held, name, own))
        held[name] = nn.Parameter(new, own.requires_grad) if isinstance(own, nn.Parameter) else new


def _back(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(module, name, value)


def _filled(tensor: Tensor, values: Tensor) -> Callable[[], None]:
    def fill() -> None:
        with torch.no_grad():
            tensor.copy_(values)

    return fill


def _held(held: dict[str, Any], name: str, value: Tensor) -> Callable[[], None]:
    return lambda: held.__setitem__(name, value)


def _key(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _state_dict(
    state: Mapping[str, Any], found: Iterable[Finding], plan: _Plan, inplace: bool
) -> Mapping[str, Any]:
    from normwise.doctor.states import tensors_in
    from normwise.interop.checkpoints.state_dicts import without_prefix
    from normwise.interop.rewriting import replaced

    held = tensors_in(state)
    full = without_prefix(list(held))
    plan.make(found, lambda layer, name: name is None or _key(layer, name) in full)
    new = {full[_key(*place)]: value for place, value in plan.tensors().items()}
    if not inplace:
        plain = state if isinstance(state, dict) else dict(state)
        return replaced(plain, {k: t.to(held[k].device) for k, t in new.items()})
    for key, value in new.items():
        own = held[key]
        with torch.no_grad():
            if own.dtype != value.dtype:
                own.data = own.data.to(value.dtype)
            own.copy_(value)
    return state


def _file(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    found: Iterable[Finding],
    plan: _Plan,
) -> str:
    from normwise.interop.checkpoints import open_checkpoint
    from normwise.interop.rewriting import rewrite

    with open_checkpoint(path) as checkpoint:
        names = set(checkpoint.tensors)
    plan.make(found, lambda layer, name: name is None or _key(layer, name) in names)
    rewrite(path, output, {_key(*place): value for place, value in plan.tensors().items()})
    return os.fspath(output)
