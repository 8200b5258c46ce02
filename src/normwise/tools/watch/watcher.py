"""The hooks: when a pass begins and ends, which calls are measured, and whose gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normwise.functional.autograd import transformed
from normwise.tools.norms import arguments_of
from normwise.tools.watch.call import Call, rows
from normwise.tools.watch.measure import count_nonfinite, gaps, mask_of, norm, spread
from normwise.tools.watch.record import WatchRecord

__all__ = ["Watcher"]

CALLS = 8
"""Calls of one norm in a pass that get a row; a recurrent network makes hundreds."""


def _recomputing() -> bool:
    """Inside of a backward: activation checkpointing runs its forwards again there.
    (torch.utils.checkpoint itself asks in this way.)"""
    return bool(torch._C._current_graph_task_id() != -1)


def _plain(t: Any) -> bool:
    """Whether it holds numbers that can be looked at: not under a transform, no fake tensor, no
    tensor spread over machines."""
    return (
        type(t) in (Tensor, nn.Parameter)
        and t.is_floating_point()
        and t.layout == torch.strided
        and t.device.type != "meta"
    )


class Watcher:
    """``with Watcher(...)``: hooks stand on the model, on its norms only while they are measured.

    Args:
        model: whose forward is a pass.
        norms: what is measured, by name.
        record: takes the rows; sinks: functions that take them, too.
        every, values: as in ``watch``.
    """

    def __init__(
        self,
        model: nn.Module,
        norms: Mapping[str, nn.Module],
        record: WatchRecord,
        sinks: Sequence[Callable[[list[dict[str, Any]]], None]],
        every: int,
        values: int,
    ) -> None:
        self.model, self.norms, self.record, self.sinks = model, norms, record, sinks
        self.every, self.values = every, values
        self.passes = 0
        self.last_eval: int | None = None  # the pass of the last one in eval mode that was measured
        self.depth = 0  # of forwards of the model within one another
        self.fixed: dict[str, Any] | None = None  # of the rows of this pass, if it is measured
        self.counts: dict[str, int] = {}  # calls of each norm in this pass
        self.entered: dict[int, list[Call | None]] = {}  # norms that run, by id
        self.calls: list[Call] = []  # measured and not in the record yet
        self.arrived = False  # a gradient of theirs
        self.own: list[RemovableHandle] = []
        self.on_norms: list[RemovableHandle] = []
        self.on_tensors: list[RemovableHandle] = []
        # Until the model's own forward is seen, a norm's second call begins a new pass: somebody
        # runs the parts of a container. A model that is a norm itself has its hooks all the time,
        # because hooks that are set during a call are not run by it.
        self.by_calls = True
        self.always = any(module is model for module in norms.values())

    def __enter__(self) -> Watcher:
        model = self.model
        self.own.append(model.register_forward_pre_hook(self._begin))
        self._watch_norms()
        self.own.append(model.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, *error: Any) -> None:
        self._leave_norms()
        for handle in self.own:
            handle.remove()
        self.own.clear()
        self.flush()

    # -- passes ---------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or _recomputing():
            return
        self.depth += 1
        if self.depth > 1:
            return
        self.by_calls = False
        self._start()
        if not self.always:
            if self.fixed is None:
                self._leave_norms()
            elif not self.on_norms:
                self._watch_norms()

    def _end(self, module: nn.Module, args: Any, result: Any) -> None:
        if torch.compiler.is_compiling() or _recomputing():
            return
        self.depth = max(self.depth - 1, 0)
        if self.depth == 0:
            self.fixed = None
            self.entered.clear()
            if not self.always:
                self._leave_norms()

    def _start(self) -> None:
        """A pass: whether it is measured, and whether what was measured before is complete."""
        record, training = self.record, self.model.training
        if training:
            measured = (record.steps - record.start) % self.every == 0
        else:
            measured = self.last_eval is None or self.passes - self.last_eval >= self.every
        if self.calls and (measured or self.arrived):
            self.flush()
        self.fixed = None
        if measured:
            self.counts = {}
            mode = "train" if training else "eval"
            self.fixed = {"step": record.steps, "mode": mode}
            if not training:
                self.last_eval = self.passes
        self.passes += 1
        if training:
            record.steps += 1
        else:
            record.eval_passes += 1

    def flush(self) -> None:
        """What was measured goes to the record and the files."""
        begin = time.perf_counter()
        for handle in self.on_tensors:
            handle.remove()
        self.on_tensors.clear()
        calls, self.calls, self.arrived = self.calls, [], False
        found = rows(calls, self.record.percentiles)
        if found:
            for sink in self.sinks:
                sink(found)
        self.record.seconds += time.perf_counter() - begin
        self.record.add(found)

    # -- norms ----------------------------------------------------------------------------------

    def _watch_norms(self) -> None:
        for name, module in self.norms.items():
            # Last of the hooks before and first of those after: what the norm itself sees.
            before = module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
            after = module.register_forward_hook(self._after, prepend=True)
            self.on_norms += (before, after)

    def _leave_norms(self) -> None:
        for handle in self.on_norms:
            handle.remove()
        self.on_norms.clear()

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or _recomputing():
            return
        if self.by_calls and (self.passes == 0 or name in self.counts):
            self._start()
            self.counts = {}
        index = self.counts.get(name, 0)
        self.counts[name] = index + 1
        call = None
        if self.fixed is not None and index < CALLS and not transformed():
            begin = time.perf_counter()
            call = self._measure(name, module, index, arguments_of(module, args, kwargs))
            self.record.seconds += time.perf_counter() - begin
        self.entered.setdefault(id(module), []).append(call)

    def _after(self, module: nn.Module, args: Any, y: Any) -> None:
        if torch.compiler.is_compiling() or _recomputing():
            return
        entered = self.entered.get(id(module))
        call = entered.pop() if entered else None
        if call is None:
            return
        begin = time.perf_counter()
        if _plain(y):
            with torch.no_grad():
                call.tensors["output"] = spread(y, self.values)
        self.calls.append(call)  # now that the norm has taken its input
        self.record.seconds += time.perf_counter() - begin

    def _measure(
        self, name: str, module: nn.Module, index: int, given: dict[str, Any]
    ) -> Call | None:
        x = given["0"]
        if not _plain(x):
            return None
        assert self.fixed is not None
        call = Call(
            {
                **self.fixed,
                "name": name,
                "call": index,
                "kind": type(module).__name__,
                "training": module.training,
                "values": x.numel(),
            }
        )
        with torch.no_grad():
            mask = mask_of(module, x, given)
            call.tensors["input"] = spread(x, self.values, mask)
            call.tensors["nonfinite"] = count_nonfinite(x.detach(), mask)
            gap = gaps(module, x, mask)
            if gap is not None:
                call.tensors["gaps"] = gap
        if torch.is_grad_enabled() and x.requires_grad:
            self._listen(x, call, "input_grad")
        for attribute, what in (("weight", "gamma"), ("bias", "beta")) if index == 0 else ():
            parameter: Any = getattr(module, attribute, None)
            if not _plain(parameter):
                continue
            with torch.no_grad():
                call.tensors[what] = spread(parameter, self.values)
            if torch.is_grad_enabled() and parameter.requires_grad:
                self._listen(parameter, call, f"{what}_grad")
        return call

    def _listen(self, t: Tensor, call: Call, name: str) -> None:
        def arrived(gradient: Tensor) -> None:
            if call.closed or name in call.tensors or not _plain(gradient):
                return
            begin = time.perf_counter()
            call.tensors[name] = norm(gradient)
            self.arrived = True
            self.record.seconds += time.perf_counter() - begin

        self.on_tensors.append(t.register_hook(arrived))
