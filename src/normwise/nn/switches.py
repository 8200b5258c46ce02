"""What normalizes, what moves, and whose statistics: the switches that every batch norm has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normwise import functional as F
from normwise.errors import InputError, message
from normwise.functional.by_moments import move_running, packed_moments
from normwise.moments import Moments
from normwise.nn import modes

__all__ = ["RunningStatistics", "Switches", "add_domains"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "normalize_with": (None, "batch", "running"),
    "update_stats": (None, True, False),
}

if TYPE_CHECKING:
    _Base = _BatchNorm
else:
    _Base = object


class RunningStatistics(nn.Module):
    """One named set of running statistics: the buffers of a batch norm, and nothing else."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, mean: Tensor, var: Tensor, tracked: Tensor) -> None:
        super().__init__()
        self.register_buffer("running_mean", mean.detach().clone())
        self.register_buffer("running_var", var.detach().clone())
        self.register_buffer("num_batches_tracked", tracked.detach().clone())

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}"


class Switches(_Base):
    """``normalize_with``, ``update_stats`` and domains; None follows ``.train()`` and ``.eval()``.

    The forward asks ``_switched`` alone: True where one of them is set.
    """

    _normalize_with: str | None = None
    _update_stats: bool | None = None
    _switched: bool = False
    # Of the layers that have the switches.
    channel_dim: int
    nonfinite: str
    _batch_norm: Any

    def _merged_over_ranks(self, moments: Tensor) -> Tensor:
        """This batch's moments, (3, C); a synchronised layer merges the other ranks'."""
        return moments

    @property
    def domains(self) -> nn.ModuleDict | None:
        """The named sets of running statistics, None without any."""
        found: nn.ModuleDict | None = self._modules.get("domains")  # type: ignore[assignment] # a ModuleDict, if there
        return found

    @property
    def normalize_with(self) -> str | None:
        """'batch', 'running', or None: the batch in training mode, the running ones in eval."""
        return self._normalize_with

    @normalize_with.setter
    def normalize_with(self, value: str | None) -> None:
        self._switch("normalize_with", value)

    @property
    def update_stats(self) -> bool | None:
        """Whether a batch moves the running statistics; None: in training mode."""
        return self._update_stats

    @update_stats.setter
    def update_stats(self, value: bool | None) -> None:
        self._switch("update_stats", value)

    def _switch(self, name: str, value: Any) -> None:
        choices = _CHOICES[name]
        if not any(value is c or (isinstance(c, str) and value == c) for c in choices):
            raise InputError(
                message(
                    f"{name} is a switch", repr(value), f"one of {', '.join(map(repr, choices))}"
                )
            )
        self.__dict__[f"_{name}"] = value
        unset = self._normalize_with is None and self._update_stats is None
        self.__dict__["_switched"] = not unset

    def add_domains(self, *names: str) -> None:
        """Give the layer further running statistics, used inside ``with nw.domain(name):``.

        Each begins as a copy of the present ones, and stands in the state dict as
        ``domains.<name>.running_mean``, ``….running_var`` and ``….num_batches_tracked``.

        Raises:
            InputError: a name that is empty, has a dot or is taken; a layer that tracks nothing.
        """
        if self.running_mean is None or self.running_var is None:
            raise InputError(
                message(
                    "domains are sets of running statistics",
                    "a layer without any",
                    "track_running_stats=True",
                )
            )
        for name in names:
            own = self.domains
            taken = own is not None and name in own
            if not isinstance(name, str) or not name.isidentifier() or taken or _reserved(name):
                raise InputError(
                    message(
                        "a domain has a name of its own, which stands in state dict keys",
                        f"{name!r}" + (", which the layer has already" if taken else ""),
                        "an identifier such as 'night'",
                    )
                )
            if own is None:
                own = nn.ModuleDict()
                self._modules["domains"] = own
            tracked = self.num_batches_tracked
            if tracked is None:
                tracked = torch.zeros((), dtype=torch.int64, device=self.running_mean.device)
            own[name] = RunningStatistics(self.running_mean, self.running_var, tracked)

    def _statistics(self, name: str | None) -> tuple[Any, Any, Any]:
        """(running_mean, running_var, num_batches_tracked) of a domain, None the main ones."""
        domains = self.domains
        if name is None or domains is None:
            return self.running_mean, self.running_var, self.num_batches_tracked
        if name not in domains:
            raise InputError(
                message(
                    "a domain that is in force is one of the layer's, where it has any",
                    f"{name!r} and a layer with {', '.join(map(repr, domains))}",
                    "nw.nn.add_domains(model, name) before",
                )
            )
        own: Any = domains[name]
        return own.running_mean, own.running_var, own.num_batches_tracked

    def _by_switches(
        self, input: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None
    ) -> Tensor:
        """The forward where a switch or a context has a say."""
        now = modes.current() if modes.ACTIVE else modes.DEFAULT
        by_batch = (
            self.training if self._normalize_with is None else self._normalize_with == "batch"
        )
        moves = self.training if self._update_stats is None else self._update_stats
        mean, var, tracked = self._statistics(now.domain)
        if now.recorder is not None:
            mean, var, tracked = now.recorder((mean, var, tracked))
        if not by_batch and mean is None and var is None and self._normalize_with is None:
            by_batch = True  # as in torch.nn: without buffers the batch normalizes in eval too
        tracking = self.track_running_stats and mean is not None and var is not None
        moves = moves and tracking and not now.hold
        momentum = 0.0 if self.momentum is None and tracked is None else self.momentum
        counter = self._buffers.get("num_nonfinite_batches")
        call: dict[str, Any] = {
            "residual": residual,
            "mask": mask,
            "activation": activation,
            "channel_dim": self.channel_dim,
            "nonfinite": self.nonfinite,
        }
        affine: tuple[Any, Any] = (self.weight, self.bias)
        if by_batch and moves and now.accumulator is None:
            y: Tensor = self._batch_norm(
                input, mean, var, *affine, True, momentum, self.eps, **call,
                num_batches_tracked=tracked, nonfinite_batches=counter,
            )  # fmt: skip
            return y
        # Copies take what shall not move, or not now: autograd may keep the values that normalized.
        if by_batch:
            kept: tuple[Any, Any] = (mean.clone(), var.clone()) if tracking else (None, None)
            count = tracked.clone() if tracking and tracked is not None else None
            y = self._batch_norm(
                input, *kept, *affine, True, momentum, self.eps, **call, num_batches_tracked=count
            )
        else:
            kept = (mean.clone(), var.clone()) if moves else (mean, var)
            y = F.batch_norm(input, *kept, *affine, False, momentum, self.eps, **call)
        if moves:
            self._see(input, mask, (mean, var, tracked, counter), momentum, now)
        return y

    def _see(
        self,
        x: Tensor,
        mask: Tensor | None,
        statistics: tuple[Any, Any, Any, Any],
        momentum: float | None,
        now: modes.Modes,
    ) -> None:
        """Take the batch's moments into the running statistics, now or when the block ends."""
        axis = self.channel_dim % x.dim()
        moments = packed_moments(x, mask, axis)

        def take_in(packed: Tensor) -> None:
            packed = self._merged_over_ranks(packed)
            move_running(*statistics, packed, momentum, self.nonfinite)

        if now.accumulator is None:
            take_in(moments)
            return
        # One count for all channels: a mask is the same for each.
        now.accumulator.add(
            (self, now.domain),
            Moments(moments[0], moments[1], moments[2]),
            lambda m: take_in(torch.stack([m.count.to(m.mean.dtype), m.mean, m.m2])),
        )


def _reserved(name: str) -> bool:
    return hasattr(nn.ModuleDict(), name)


def add_domains(model: nn.Module, names: Sequence[str] | str) -> int:
    """Give every normwise batch norm of ``model`` the named running statistics; how many layers.

    Each set begins as a copy of the layer's present statistics; layers that track none are left
    alone. See :func:`normwise.domain`.

    Example:
        >>> import torch, normwise as nw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), nw.nn.BatchNorm1d(3))
        >>> nw.nn.add_domains(model, ["night"])
        1
        >>> [k for k in model.state_dict() if "night" in k][0]
        '1.domains.night.running_mean'
    """
    wanted = [names] if isinstance(names, str) else list(names)
    layers = [m for m in model.modules() if isinstance(m, Switches) and m.running_mean is not None]
    for layer in layers:
        layer.add_domains(*wanted)
    return len(layers)
