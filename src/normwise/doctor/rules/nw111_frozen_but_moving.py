from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normwise.doctor.finding import Finding, Repair
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["FrozenButMoving"]


class FrozenButMoving(Rule):
    """## What it finds
    A batch norm in training mode whose parameters are all frozen (``requires_grad=False``) while
    its momentum is not 0; one without parameters, if every parameter of the model is frozen.

    ## Why it is bad
    ``requires_grad=False`` freezes parameters, not buffers. In training mode every batch still
    moves the running statistics, and still normalizes by itself. A "frozen" backbone so drifts to
    the new data step by step: the checkpoint's features change though no weight does, and a second
    head on the same backbone degrades.

    ## Example
    ```python
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    backbone.requires_grad_(False)
    backbone.train()
    nw.check(backbone)
    ```

    ## Remedy
    ``module.eval()`` for these norms after every ``model.train()``, or for good
    ``nw.convert(model, "frozen")``, which makes constants of them.

    ## Sources
    ``torch.nn.Module.requires_grad_``, ``torch.nn.Module.eval``; Wu et al. 2019, detectron2, which
    has ``FrozenBatchNorm2d`` for this.
    """

    code = "NW111"
    name = "frozen-but-moving"
    severity = "warning"
    confidence = "medium"
    needs = "model"

    def check(self, subject: Subject) -> Iterator[Finding]:
        assert subject.model is not None
        every = [p.requires_grad for p in subject.model.parameters()]
        whole = bool(every) and not any(every)
        for norm in subject.batch_norms():
            module = norm.module
            if not isinstance(module, _BatchNorm) or not _moves(module):
                continue
            own = [p.requires_grad for p in module.parameters(recurse=False)]
            if any(own) or (not own and not whole):
                continue
            yield self.finding(
                norm.name,
                "its parameters are frozen, but it is in training mode: every batch moves the "
                f"running statistics by {'1/n' if module.momentum is None else module.momentum} of "
                "the difference",
                "eval mode for this norm, or nw.convert(model, 'frozen')",
                repair=Repair(
                    False,
                    "puts the norm into eval mode, until the next .train()",
                    attributes={"training": False},
                ),
                parameters=len(own),
                momentum=module.momentum,
                model_frozen=whole,
            )


def _moves(module: nn.Module) -> bool:
    still = getattr(module, "update_stats", None) is False or module.momentum == 0
    return module.training and bool(module.track_running_stats) and not still
