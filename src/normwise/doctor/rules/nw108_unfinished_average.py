from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from normwise.doctor.figures import DEFAULT_MOMENTUM, eps_of
from normwise.doctor.finding import Finding, Repair
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["UnfinishedAverage"]

# What is left of the initial value may be 1 %: 44 batches with momentum 0.1, 459 with 0.01.
_LEFT = 0.01


class UnfinishedAverage(Rule):
    """## What it finds
    Running statistics in which (1 - m)^n, the weight of the initial values 0 and 1 after n batches,
    is still over 1 %.

    ## Why it is bad
    The running variance is (1 - m)^n·1 + …: a channel with a variance of 0.001 after 20 batches
    with m = 0.1 remembers 0.12 and comes out a tenth as large in eval mode as in training. Short
    fine-tuning, small data sets, and a small momentum do it: with Keras' 0.01 it takes 459 batches.

    ## Example
    ```python
    bn = torch.nn.BatchNorm1d(4, momentum=0.01)
    for _ in range(100):
        bn(torch.randn(32, 4) * 0.1)
    nw.check(bn)  # running_var is 0.37, the data's variance 0.01
    ```

    ## Remedy
    Recalibrate (``nw.recalibrate(model, data)``), or train with a larger momentum, or with None.
    Recalibration itself and ``update_bn`` set the counter to the batches that they pooled; where
    that is visible (a variance below (1 - m)^n cannot come from such an average) nothing is said,
    else the finding is to be ignored. The fix counts as many batches as the average would need.

    ## Sources
    ``torch.nn.BatchNorm2d``, the update rule. The same start-up bias is what Adam corrects for:
    Kingma & Ba 2015, section 3.
    """

    code = "NW108"
    name = "unfinished-average"
    severity = "warning"
    confidence = "medium"

    def check(self, subject: Subject) -> Iterator[Finding]:
        for norm in subject.batch_norms():
            assert norm.var is not None
            n, m = norm.num_batches_tracked, norm.momentum
            if m is None and norm.module is None:
                m = DEFAULT_MOMENTUM
            if not n or m is None or not 0 < m < 1 or norm.cumulative:
                continue
            if not bool(torch.isfinite(norm.var).all()):  # NW101's
                continue
            left = (1 - m) ** n
            # Float32 holds a variance to 6e-8, and n of these may add up: 1e-4 is beyond doubt.
            if left <= _LEFT or bool((norm.var < left * (1 - 1e-4)).any()):
                continue
            true = ((norm.var - left) / (1 - left)).clamp(min=0) + eps_of(norm)
            off = float(((norm.var + eps_of(norm)) / true).sqrt().max())
            needed = math.ceil(math.log(_LEFT) / math.log1p(-m))
            yield self.finding(
                norm.name,
                f"after {n} batches with momentum {m:g} the running statistics are to "
                f"{left:.1%} the constructor's; a deviation is up to {off:.3g} times too large",
                f"recalibrate, or train for {needed} batches at least",
                repair=Repair(
                    False,
                    f"takes the running statistics anew and counts {needed} batches",
                    {"num_batches_tracked": torch.tensor(needed)},
                    recalibrate=True,
                ),
                num_batches_tracked=n,
                momentum=m,
                left=left,
                needed=needed,
                deviation=off,
            )
