"""What the rules look at: each norm's state, and, as far as they were given, the modules, the graph
of a run, and what data show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from normwise.doctor.dynamics import Dynamics
    from normwise.doctor.structure import Structure

__all__ = ["NormState", "Subject"]


@dataclass(eq=False)
class NormState:
    """One norm as a checkpoint or a module holds it. Tensors are detached, in their own dtype and
    on the CPU; None where the norm has none. What a checkpoint does not say is None too.

    kind: 'batch_norm', 'instance_norm', 'layer_norm', 'group_norm' or 'rms_norm'.
    """

    name: str
    kind: str = "batch_norm"
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: int | None = None
    eps: float | None = None
    momentum: float | None = None
    cumulative: bool = False
    """``momentum=None`` of a module: the running statistics are plain averages."""
    module: nn.Module | None = None

    @property
    def has_statistics(self) -> bool:
        return self.running_mean is not None and self.running_var is not None

    @property
    def num_features(self) -> int:
        tensors = (self.running_var, self.weight, self.running_mean, self.bias)
        return next((t.numel() for t in tensors if t is not None), 0)

    @cached_property
    def gamma(self) -> Tensor | None:
        """The weight in float64."""
        return None if self.weight is None else self.weight.double()

    @cached_property
    def beta(self) -> Tensor | None:
        """The bias in float64."""
        return None if self.bias is None else self.bias.double()

    @cached_property
    def mean(self) -> Tensor | None:
        """The running mean in float64."""
        return None if self.running_mean is None else self.running_mean.double()

    @cached_property
    def var(self) -> Tensor | None:
        """The running variance in float64."""
        return None if self.running_var is None else self.running_var.double()

    @property
    def trained(self) -> bool:
        """Whether the weight or the bias differs from what the constructor writes."""
        scaled = self.weight is not None and bool((self.weight != 1).any())
        return scaled or (self.bias is not None and bool((self.bias != 0).any()))

    @property
    def untouched(self) -> bool:
        """Whether the statistics are exactly what the constructor writes: 0 and 1."""
        mean, var = self.running_mean, self.running_var
        return (
            mean is not None
            and var is not None
            and bool((mean == 0).all())
            and bool((var == 1).all())
        )


@dataclass(eq=False)
class Subject:
    """norms: every norm, in the order of the model or the file. model: None for a checkpoint.
    structure: after a run on an example. dynamics: after runs on data. peers: the norms of other
    checkpoints of the same model (other ranks, an earlier step), by name. optimizer: the one that
    trains the model. framework: that the numbers came from ('keras', 'flax', …), if it was said."""

    norms: Sequence[NormState]
    source: str = "the model"
    model: nn.Module | None = None
    structure: Structure | None = None
    dynamics: Dynamics | None = None
    peers: dict[str, dict[str, NormState]] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None
    framework: str | None = None
    data: Any = None

    def __iter__(self) -> Iterator[NormState]:
        return iter(self.norms)

    @cached_property
    def by_name(self) -> dict[str, NormState]:
        return {norm.name: norm for norm in self.norms}

    def batch_norms(self) -> Iterator[NormState]:
        """Those with running statistics."""
        return (n for n in self.norms if n.kind == "batch_norm" and n.has_statistics)

    def has(self, need: str) -> bool:
        """Whether a rule that ``needs`` this can run."""
        return {
            "state": True,
            "model": self.model is not None,
            "graph": self.structure is not None,
            "data": self.dynamics is not None,
            "optimizer": self.optimizer is not None and self.model is not None,
            "peers": bool(self.peers),
        }[need]
