"""A checkpoint that is open: what it holds, and its norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from normwise.errors import CheckpointError, message
from normwise.interop.checkpoints.file import refuse
from normwise.interop.checkpoints.grouping import NormPlan, plans_of
from normwise.interop.checkpoints.limits import MB, NORMS, numel, shown
from normwise.interop.checkpoints.state_dicts import without_prefix
from normwise.interop.checkpoints.tensors import TensorInfo

__all__ = ["Checkpoint", "Content", "StoredNorm"]


@dataclass(frozen=True)
class StoredNorm:
    """A norm as a file has it.

    name: the layer's qualified name. kind: ``'batch_norm'`` (instance norm with running statistics
    has the same tensors), ``'layer_norm'``, ``'group_norm'``, ``'instance_norm'``, ``'rms_norm'``.
    The tensors have the dtype of the file; None is what the file does not hold. eps and momentum
    are known where a file holds the graph; momentum is torch's, the weight of the new batch.
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
        total = sum(self._checked(plan) for plan in plans)
        if total > NORMS:
            refuse(
                self.path,
                f"norms of {total / MB:.0f} MB together, more than {NORMS // MB}: they are vectors",
                "a file of one model's weights",
            )
        return [self._norm(plan) for plan in plans]

    def _checked(self, plan: NormPlan) -> int:
        """Bytes of the norm's tensors, once they are known to fit each other."""
        infos = {role: self.tensors[name] for role, name in plan.tensors.items()}
        tracked = infos.pop("num_batches_tracked", None)
        shapes = {role: info.shape for role, info in infos.items()}
        vectors = plan.kind != "layer_norm"  # which may average several axes
        if len(set(shapes.values())) > 1 or (vectors and any(len(s) != 1 for s in shapes.values())):
            self._misfit(plan, "one size", ", ".join(f"{r} {s}" for r, s in shapes.items()))
        for role, info in infos.items():
            if info.dtype is None or not info.dtype.is_floating_point:
                self._misfit(plan, "floating point dtypes", f"{role} of dtype {info.dtype}")
        if tracked and (numel(tracked.shape) != 1 or tracked.dtype is None):
            self._misfit(plan, "one count of batches", f"num_batches_tracked {tracked.shape}")
        return sum(numel(i.shape) * i.dtype.itemsize for i in infos.values() if i.dtype)

    def _misfit(self, plan: NormPlan, wanted: str, got: str) -> None:
        refuse(
            self.path,
            f"{shown(plan.name)} with {got}",
            "the model that wrote the file, to see which of these is right",
            f"the tensors of a norm have {wanted}, that of its channels",
        )

    def _norm(self, plan: NormPlan) -> StoredNorm:
        read: dict[str, Any] = {role: self.read(name) for role, name in plan.tensors.items()}
        return StoredNorm(plan.name, eps=plan.eps, momentum=plan.momentum, kind=plan.kind, **read)
