from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["FewValues"]

# The relative error of the variance of n values is about sqrt(2 / (n - 1)): 37 % at 16.
_FEW = 16


class FewValues(Rule):
    """## What it finds
    A batch norm that averages over fewer than 16 values a channel in a batch of the data: batch
    size times positions.

    ## Why it is bad
    - One value: it equals its own mean. The output is β, whatever the input; torch.nn raises.
    - Two values: the output is +γ+β and −γ+β, whatever the input (eps aside): all but the sign of
      the difference is gone.
    - A few: the standard deviation that divides is off by tens of percent from batch to batch
      (about sqrt(2/(n−1)) of the variance: 37 % at 16 values), and eval mode, which divides by an
      average, computes something else than what was trained.

    ## Example
    ```python
    head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.BatchNorm2d(256))
    head(torch.randn(2, 256, 14, 14))  # two values a channel: the output is -1 or 1
    ```

    ## Remedy
    Larger batches; ``nw.nn.SyncBatchNorm`` over the ranks; group or layer norm, or
    ``nw.nn.BatchRenorm``, where batches must be small (docs/choosing.md has a measured comparison).

    ## Sources
    Wu & He 2018, *Group Normalization*, figure 1; Ioffe 2017, *Batch Renormalization*, section 1.
    """

    code = "NW302"
    name = "few-values"
    severity = "warning"
    needs = "data"

    def check(self, subject: Subject) -> Iterator[Finding]:
        dynamics = subject.dynamics
        assert dynamics is not None
        for norm in subject.norms:
            seen = dynamics.trained.get(norm.name)
            if norm.kind != "batch_norm" or seen is None or not seen.counts:
                continue
            values = int(median(seen.counts))
            if values >= _FEW or values == 0:
                continue
            size = int(median(dynamics.batch_sizes))
            if values <= 2:
                what = f"its output is {'±γ + ' if values == 2 else ''}β, whatever the input"
            else:
                what = f"the variance is off by about {(2 / (values - 1)) ** 0.5:.0%}"
            yield self.finding(
                norm.name,
                f"{values} value{'s' * (values > 1)} a channel in a batch of {size}: {what}",
                "larger batches, SyncBatchNorm, or a norm that does not look at the batch",
                severity="error" if values == 1 else None,
                confidence=None if dynamics.loader.batch_size is not None else "medium",
                values=values,
                batch_size=size,
                shape=list(seen.shapes[0]),
            )
