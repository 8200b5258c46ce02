from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject
from normwise.functional import batch_norm

__all__ = ["LossySyncConversion"]

_OWN = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
# What torch.nn's layer does not know, and the value that means "as torch.nn".
_OPTIONS = {
    "activation": None,
    "channel_dim": 1,
    "nonfinite": "propagate",
    "normalize_with": None,
    "update_stats": None,
}


class LossySyncConversion(Rule):
    """## What it finds
    A batch norm of a class of its own that ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` would
    replace, and what it would lose: a forward of its own, an activation inside, further tensors or
    children. Info: true, and worth knowing before that call.

    ## Why it is bad
    The conversion asks ``isinstance(module, _BatchNorm)`` and builds a plain ``SyncBatchNorm`` from
    the arguments that torch.nn knows. Children come along as attributes that nothing calls; an
    activation in the subclass's forward is gone without a word. The model runs, shapes fit, and
    accuracy is another.

    ## Example
    ```python
    class NormRelu(torch.nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()


    nw.check(torch.nn.Sequential(NormRelu(8)))
    ```

    ## Remedy
    Write the activation as a module of its own before converting. For normwise's layers,
    ``nw.convert(model, "sync")`` keeps all they have, and says what cannot go.

    ## Sources
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``; the same trap with timm's ``BatchNormAct2d``,
    which has a ``convert_sync_batchnorm`` of its own for it.
    """

    code = "NW117"
    name = "lossy-sync-conversion"
    severity = "info"
    needs = "model"

    def check(self, subject: Subject) -> Iterator[Finding]:
        for norm in subject:
            module = norm.module
            # Whoever has a process group is synchronised already.
            if not isinstance(module, _BatchNorm) or hasattr(module, "process_group"):
                continue
            lost = _lost(module)
            if lost:
                yield self.finding(
                    norm.name,
                    f"convert_sync_batchnorm would make this {type(module).__name__} a plain "
                    f"SyncBatchNorm, without its {', '.join(lost)}",
                    "nw.convert(model, 'sync'), or the activation as a module of its own",
                    kind=type(module).__name__,
                    lost=lost,
                )


def _lost(module: nn.Module) -> list[str]:
    kind: Any = type(module)
    computes = getattr(kind, "_batch_norm", None)  # normwise's layers, and what they compute with
    ours = computes is not None
    lost = []
    # normwise's own forward computes what torch.nn's does, but for its options, and for the
    # variants that normalize by other statistics.
    home = str(getattr(kind.forward, "__module__", ""))
    if not home.startswith(("torch.nn.modules.", "normwise.nn.")):
        lost.append("forward")
    if ours and computes is not batch_norm:
        lost.append("statistics")
    lost += [
        f"{name}={getattr(module, name)!r}"
        for name, plain in _OPTIONS.items()
        if ours and getattr(module, name, plain) != plain
    ]
    held = {**module._parameters, **module._buffers}
    lost += [f"tensor {name}" for name, t in held.items() if name not in _OWN and t is not None]
    lost += [f"child {name}" for name, _ in module.named_children()]
    return lost
