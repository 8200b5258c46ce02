"""A folded model for other runtimes: ``torch.export`` programs and ONNX, both run before they are
written."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from normwise.errors import InputError, message
from normwise.files import write_atomically
from normwise.graph.run import Call, copy_of, same_random_numbers, tensors_in
from normwise.graph.saving import package
from normwise.graph.verify import distance
from normwise.ops import reference

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["OnnxFile", "export_program", "save_program", "to_onnx"]

TOLERANCE = 1e-4
"""Of the largest value of an output; or 16 units of rounding, where those are more (half)."""


@dataclass(frozen=True)
class OnnxFile:
    """What :meth:`FoldResult.to_onnx` wrote."""

    path: str
    dynamic_batch: bool
    """Any batch size, or that of the example inputs alone."""
    batch_norms: int
    """BatchNormalization nodes in the file."""
    error: float | None
    """Of the outputs under onnxruntime, relative to their largest value; None: not verified, since
    onnxruntime is not installed."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of their own deprecations and of torchvision's absence; what matters comes
    as an error."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _rows(call: Call, count: int) -> Call:
    """A batch of ``count``: the rows of ``call`` over and over."""

    def resized(t: Tensor) -> Tensor:
        return t[torch.arange(count) % t.shape[0]] if t.dim() else t

    args, kwargs = tree_map_only(Tensor, resized, (call.args, call.kwargs))
    return Call(args, kwargs)


def _outputs(model: Any, call: Call) -> list[Tensor]:
    with torch.no_grad(), same_random_numbers():
        return [t.detach() for t in tensors_in(call.copy().run(model))]


def _has_batch(model: nn.Module, call: Call) -> bool:
    """Whether axis 0 of all inputs and outputs is one batch: n rows in, n rows out, n = 1 too."""
    sizes = {t.shape[0] for t in call.tensors() if t.dim()}
    if len(sizes) != 1 or 0 in sizes:
        return False
    counts = (1, *sizes, 5)
    try:
        runs = [_outputs(model, _rows(call, n)) for n in counts]
    except Exception:
        # A model with a fixed batch, whichever way it says so.
        return False
    rows = [[(t.dim() > 0 and t.shape[0] == n, t.shape[1:]) for t in run]
            for n, run in zip(counts, runs, strict=True)]  # fmt: skip
    return all(r == rows[0] for r in rows) and all(first for first, _ in rows[0])


def _tolerance(outputs: list[Tensor]) -> float:
    eps = [torch.finfo(t.dtype).eps for t in outputs if t.is_floating_point()]
    return max([TOLERANCE, *(16 * e for e in eps)])


def _check(runner: Any, model: nn.Module, calls: list[Call], what: str) -> float:
    """The largest error over ``calls``, or an error of that."""
    worst = 0.0
    for call in calls:
        wanted = _outputs(model, call)
        gap, allowed = distance(_outputs(runner, call), wanted), _tolerance(wanted)
        if gap > allowed:
            raise InputError(
                message(
                    f"{what} must compute what the model computes, to {allowed:g}",
                    f"an output that is off by {gap:.2g} of its largest value",
                    "a model whose forward does not depend on values, random numbers or state; "
                    "result.save() keeps any model",
                )
            )
        worst = max(worst, gap)
    return worst


def _export(model: nn.Module, call: Call) -> tuple[ExportedProgram, list[Call]]:
    """The program, and the calls that it must be right on: several batch sizes, or one."""
    from torch.export import Dim, export

    if _has_batch(model, call):
        example = _rows(call, 2)  # an axis of length 1 would be taken for a constant
        batch = Dim("batch", min=1)
        shapes = tree_map(
            lambda t: {0: batch} if isinstance(t, Tensor) and t.dim() else None,
            example.kwargs or example.args,
        )
        with contextlib.suppress(Exception):
            # Its code may fix the batch where a run does not show it (a reshape by numbers).
            program = export(model, example.args, example.kwargs, dynamic_shapes=shapes)
            return program, [_rows(call, n) for n in (1, 2, 5)]
    return export(model, call.args, call.kwargs), [call]


def _without_own_operators(program: ExportedProgram) -> ExportedProgram:
    """A norm of normwise that had to stay as plain arithmetic: what no other runtime knows is gone
    (nor would ``torch.export.load`` know it in a process without normwise)."""
    own = torch.ops.normwise
    table = {
        own.normalize.default: reference.normalize,
        own.train_forward.default: reference.train_forward,
    }
    used = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return program.run_decompositions(table) if used & table.keys() else program


def _first_cause(error: BaseException) -> str:
    """The exporters wrap what went wrong in advice on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"


def _own(model: nn.Module) -> nn.Module:
    """A copy in eval mode: runs move statistics, traces leave caches behind. One norm in training
    mode in a model in eval mode is meant so."""
    copy = copy_of(model)
    return copy.eval() if model.training else copy


def _exported(model: nn.Module, call: Call) -> tuple[ExportedProgram, list[Call]]:
    try:
        with _quiet(), torch.no_grad():
            program, calls = _export(_own(model), call.copy())
            return _without_own_operators(program), calls
    except Exception as error:
        raise InputError(
            message(
                "torch.export must be able to trace the model",
                _first_cause(error),
                "a forward without branches on values; result.save() keeps any model",
            )
        ) from error


def export_program(model: nn.Module, call: Call) -> ExportedProgram:
    """``model`` on ``call`` as a program, verified."""
    program, calls = _exported(model, call)
    _check(program.module(), _own(model), calls, "the exported program")
    return program


def save_program(program: ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Write ``program`` in one piece."""
    write_atomically(path, lambda file: torch.export.save(program, file))


class _Session:
    """An ONNX model under onnxruntime, called like the module."""

    def __init__(self, data: bytes) -> None:
        runtime = package("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        self.session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        given = [t.numpy() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        names = [i.name for i in self.session.get_inputs()]
        results = self.session.run(None, dict(zip(names, given, strict=True)))
        return [torch.from_numpy(r) for r in results]


def _installed(name: str) -> bool:
    try:
        package(name)
    except ImportError:
        return False
    return True


def _batch_norms(proto: Any) -> int:
    """BatchNormalization nodes, in functions and the branches of If and Loop too."""
    graphs, count = [proto.graph, *proto.functions], 0
    while graphs:
        for node in graphs.pop().node:
            count += node.op_type == "BatchNormalization"
            graphs += [a.g for a in node.attribute if a.HasField("g")]
    return count


def to_onnx(
    model: nn.Module, call: Call, path: str | os.PathLike[str], all_folded: bool
) -> OnnxFile:
    """Write ``model`` as ONNX; verify it first where onnxruntime is there."""
    for name in ("onnx", "onnxscript"):
        package(name)
    program, calls = _exported(model, call)
    try:
        with _quiet(), torch.no_grad():
            made = torch.onnx.export(program, dynamo=True, verbose=False)
        assert made is not None
        proto = made.model_proto
        data = proto.SerializeToString()
    except Exception as error:
        raise InputError(
            message(
                "torch.onnx must know every operation of the model, and the file stay below 2 GB",
                _first_cause(error),
                "result.export() or result.save(), which know all that torch knows",
            )
        ) from error
    left = _batch_norms(proto)
    if all_folded and left:
        raise InputError(
            message(
                "where all batch norms are folded the file holds none",
                f"{left} BatchNormalization nodes",
                "result.export(), whose program can be read; and report this as a defect",
            )
        )
    gap = None
    if _installed("onnxruntime"):
        try:
            gap = _check(_Session(data), _own(model), calls, "the ONNX file under onnxruntime")
        except InputError:
            raise
        except Exception as error:  # its own classes, one for each code; TypeError of NumPy
            raise InputError(
                message(
                    "onnxruntime must be able to run the file on the CPU",
                    _first_cause(error),
                    "a float32 copy of the model for the fold (it knows no bfloat16 convolution)",
                )
            ) from error
    write_atomically(path, lambda file: file.write(data))
    return OnnxFile(os.fspath(path), len(calls) > 1, left, gap)
