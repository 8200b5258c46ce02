"""A checkpoint that is open: what it holds, and its norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

from torch import Tensor

from normwise.errors import CheckpointError, message
from normwise.interop.checkpoints.file import refuse
from normwise.interop.checkpoints.grouping import NormPlan, plans_of
from normwise.interop.checkpoints.limits import MB, NORMS, numel, shown
from normwise.interop.checkpoints.state_dicts import without_prefix
from normwise.interop.checkpoints.tensors import TensorInfo

__all__ = ["Checkpoint", "Content", "StoredNorm", "group_norms"]


@dataclass(frozen=True)
class StoredNorm:
    """A norm as a file has it.

    name: the layer's qualified name. kind: ``'batch_norm'`` (instance norm with running statistics
    has the same tensors), ``'layer_norm'``, ``'group_norm'``, ``'instance_norm'``, ``'rms_norm'``.
    The tensors have the dtype of the file; None is what the file does not hold. eps and momentum
    are known where a file holds the graph; momentum is torch's, the weight of the new batch.
    num_batches_tracked is an integer; None also where it was saved as a float that overflowed.
    """

    name: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    eps: float | None = None
    momentum: float | None = None
    kind: str = "batch_norm"


class Content(Protocol):
    """What the reader of a format gives: the tensors' descriptions, and the way to their bytes."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def load(self, name: str) -> Tensor: ...

    def plans(self) -> list[NormPlan] | None:
        """The norms, where the file says more of them than names do."""

    def close(self) -> None: ...


class Checkpoint:
    """An open checkpoint, made by :func:`open_checkpoint`; a context manager.

    path: as given. format: ``'safetensors'``, ``'pickle'``, ``'onnx'``, ``'exported'`` or
    ``'sharded'``. tensors: shape and dtype of each tensor, by name; none of them is in memory.
    """

    def __init__(self, path: str, format: str, content: Content) -> None:
        self.path, self.format, self._content = path, format, content
        self._plans = content.plans()
        names = list(content.tensors)
        # A graph names its tensors as it must; a state dict may have been saved with a wrapper's.
        self._names = {n: n for n in names} if self._plans is not None else without_prefix(names)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {short: content.tensors[name] for short, name in self._names.items()}
        )

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing can be read afterwards."""
        self._content.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, {self.format}, {len(self.tensors)} tensors)"

    def read(self, name: str) -> Tensor:
        """The tensor of this name: its bytes are read, and no others.

        Raises:
            CheckpointError: if there is none, or the file changed since it was opened.
        """
        if name not in self.tensors:
            raise CheckpointError(
                message(
                    "read takes the name of a tensor of the checkpoint",
                    f"{shown(name)}, which {self.path!r} does not have",
                    "one of checkpoint.tensors",
                )
            )
        return self._content.load(self._names[name])

    def norms(self) -> list[StoredNorm]:
        """The norms, in the order of the file, with their tensors.

        A layer with ``running_mean`` and ``running_var`` is a batch norm. A norm without them is
        listed if its name says what it is (``ln_1``, ``layernorm``, ``gn2``, ``rms_norm``).

        Raises:
            CheckpointError: if a norm's tensors do not fit each other, in shape or dtype.
        """
        plans = plans_of(self.tensors) if self._plans is None else self._plans
        total = sum(_checked(plan, self.tensors, self.path) for plan in plans)
        if total > NORMS:
            refuse(
                self.path,
                f"norms of {total / MB:.0f} MB together, more than {NORMS // MB}: they are vectors",
                "a file of one model's weights",
            )
        return [_norm(plan, self.read) for plan in plans]


def group_norms(
    shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]
) -> list[StoredNorm]:
    """The norms of a state dict in memory, by the same rules as those of a file.

    ``shapes`` of all its tensors, by name; ``read`` gives the tensor of a name, and only of norms.

    Raises:
        CheckpointError: if a norm's tensors do not fit each other, in shape or dtype.

    Example:
        >>> import torch
        >>> state = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm1d(3)).state_dict()
        >>> norms = group_norms({k: tuple(t.shape) for k, t in state.items()}, state.__getitem__)
        >>> [norm.name for norm in norms]
        ['1']
    """
    plans = plans_of({name: TensorInfo(shape, None) for name, shape in shapes.items()})
    tensors = {name: read(name) for plan in plans for name in plan.tensors.values()}
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    for plan in plans:
        _checked(plan, infos, "state_dict")
    return [_norm(plan, tensors.__getitem__) for plan in plans]


def _checked(plan: NormPlan, tensors: Mapping[str, TensorInfo], source: str) -> int:
    """Bytes of the norm's tensors, once they are known to fit each other."""
    infos = {role: tensors[name] for role, name in plan.tensors.items()}
    tracked = infos.pop("num_batches_tracked", None)
    shapes = {role: info.shape for role, info in infos.items()}
    vectors = plan.kind != "layer_norm"  # which may average several axes
    if len(set(shapes.values())) > 1 or (vectors and any(len(s) != 1 for s in shapes.values())):
        _misfit(plan, source, "one size", ", ".join(f"{r} {s}" for r, s in shapes.items()))
    for role, info in infos.items():
        if info.dtype is None or not info.dtype.is_floating_point:
            _misfit(plan, source, "floating point dtypes", f"{role} of dtype {info.dtype}")
    if tracked and (numel(tracked.shape) != 1 or tracked.dtype is None or tracked.dtype.is_complex):
        _misfit(plan, source, "one count of batches", f"num_batches_tracked {tracked.shape}")
    return sum(numel(i.shape) * i.dtype.itemsize for i in infos.values() if i.dtype)


def _misfit(plan: NormPlan, source: str, wanted: str, got: str) -> NoReturn:
    refuse(
        source,
        f"{shown(plan.name)} in {source!r} with {got}",
        "the model that wrote the file, to see which of these is right",
        f"the tensors of a norm have {wanted}, that of its channels",
    )


def _norm(plan: NormPlan, read: Callable[[str], Tensor]) -> StoredNorm:
    found: dict[str, Any] = {role: read(name) for role, name in plan.tensors.items()}
    tracked = found.get("num_batches_tracked")
    if tracked is not None and tracked.is_floating_point():
        # Cast with the weights: in half precision a count over 65,504 has become infinite.
        found["num_batches_tracked"] = tracked.long() if tracked.double().isfinite() else None
    return StoredNorm(plan.name, eps=plan.eps, momentum=plan.momentum, kind=plan.kind, **found)
