"""All or nothing: whatever ends the block, the model is as it was, but for what was committed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["RandomState", "Transaction"]


@dataclass
class RandomState:
    """The global random generators: torch's on every device in use, Python's, NumPy's."""

    torch: Tensor
    devices: dict[str, list[Tensor]]
    python: tuple[Any, ...]
    numpy: Any

    @classmethod
    def now(cls) -> RandomState:
        devices = {}
        # A device that nobody has used yet is not woken up for this.
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            devices["cuda"] = torch.cuda.get_rng_state_all()
        legacy = np.random.get_state()  # noqa: NPY002 what transforms of images still draw from
        return cls(torch.get_rng_state(), devices, random.getstate(), legacy)

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        if "cuda" in self.devices:
            torch.cuda.set_rng_state_all(self.devices["cuda"])
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 the same

    def to_plain(self) -> dict[str, Any]:
        """Tensors and numbers only, for a file that is read without trust."""
        name, keys, *rest = self.numpy
        return {
            "torch": self.torch,
            "devices": self.devices,
            "python": [self.python[0], list(self.python[1]), self.python[2]],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> RandomState:
        version, internal, gauss = plain["python"]
        name, keys, *rest = plain["numpy"]
        return cls(
            plain["torch"],
            plain["devices"],
            (version, tuple(internal), gauss),
            (name, keys.numpy().astype(np.uint32), *rest),
        )


class Transaction:
    """``with Transaction(model) as t:`` puts back flags, hooks, buffers, attributes of norms and
    random state on every exit, Ctrl-C included. What ``t.on_success`` does comes after that, and
    only if the block ended well.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.on_success: Callable[[], None] | None = None

    def __enter__(self) -> Transaction:
        self.random = RandomState.now()
        self.training = [(m, m.training) for m in self.model.modules()]
        self.momentum = [(m, m.momentum) for m, _ in self.training if hasattr(m, "momentum")]
        self.buffers = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module, _ in self.training
            for name, buffer in module._buffers.items()
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._restore()
            if kind is None and self.on_success is not None:
                try:
                    self.on_success()
                except BaseException:
                    self._restore()
                    raise
        finally:
            self.random.restore()

    def _restore(self) -> None:
        with torch.no_grad():
            for module, name, buffer, values in self.buffers:
                module._buffers[name] = buffer
                if buffer is not None and values is not None:
                    buffer.copy_(values)
        for module, flag in self.training:
            module.training = flag
        for module, momentum in self.momentum:
            module.momentum = momentum

    def evaluate(self, by_batch: list[nn.Module]) -> None:
        """Everything in eval mode but ``by_batch``, which normalize by the batch.

        The flags are set one by one: an overridden ``train()`` may keep norms frozen or merge
        weights.
        """
        for module, name, buffer, _ in self.buffers:
            module._buffers[name] = buffer
        for module, _ in self.training:
            module.training = False
        for module in by_batch:
            if hasattr(module, "process_group"):
                # A synchronised norm in training waits for ranks that may have no batch left; in
                # eval without buffers it normalizes by its own batch.
                module._buffers["running_mean"] = module._buffers["running_var"] = None
            else:
                module.training = True
