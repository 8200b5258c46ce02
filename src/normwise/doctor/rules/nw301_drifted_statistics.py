from __future__ import annotations

from collections.abc import Iterator

import torch

from normwise.doctor.compare import noise, shift
from normwise.doctor.finding import Finding, Repair
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["DriftedStatistics"]

# The root mean square change of a normalized value, which is of size 1. Statistics that follow
# training by an exponential average of 10 batches are off by 0.05 to 0.2 on a network that has
# settled; half a standard deviation is what fine-tuning on other data or a broken update leave.
_WARNING, _ERROR = 0.5, 2.0


class DriftedStatistics(Rule):
    """## What it finds
    Running statistics that are not those of the data: the rule runs the data with every layer
    normalizing by the batch, takes the moments of what each layer sees, and tells what normalizing
    by the running statistics instead does to the output, sqrt(gap² + (ratio − 1)²), with the gap
    of the means in running standard deviations and the ratio of the standard deviations.

    ## Why it is bad
    In eval mode the layer's output is shifted and scaled away from what the next layer was trained
    on. The loss in training looks well, the one in eval does not.

    ## Example
    ```python
    model.train()
    for x in other_domain:  # e.g. a warm-up, or an evaluation that forgot model.eval()
        model(x)            # every call moves the running statistics
    ```

    ## Remedy
    ``nw.recalibrate(model, data)`` on data as they come in use. A fine-tuned model whose norms
    were frozen on purpose keeps its own: ignore the rule there.

    ## Sources
    Wu & Johnson 2021, *Rethinking "Batch" in BatchNorm*, section 3 (statistics by an exponential
    average lag behind, precise ones do not); Li et al. 2017, *Revisiting Batch Normalization For
    Practical Domain Adaptation*.
    """

    code = "NW301"
    name = "drifted-statistics"
    severity = "warning"
    confidence = "medium"
    needs = "data"

    def check(self, subject: Subject) -> Iterator[Finding]:
        dynamics = subject.dynamics
        assert dynamics is not None
        seen_by = dynamics.trained if dynamics.error is None else dynamics.evaluated
        samples = sum(dynamics.batch_sizes)
        for norm in subject.batch_norms():
            seen = seen_by.get(norm.name)
            if seen is None or not seen.calls or norm.mean is None or norm.var is None:
                continue
            moments = seen.moments
            if moments.mean.shape != norm.mean.shape or int(moments.count.min()) < 2:
                continue
            found = shift(moments, norm.mean, norm.var, norm.eps or 1e-5)
            if not bool(torch.isfinite(found.effect).all()):
                continue  # the rules on values that are not finite speak
            fresh = norm.untouched and not norm.trained
            overall, allowed = found.overall, 2 * noise(samples)
            if overall < _WARNING + allowed:
                continue
            worst = found.worst
            yield self.finding(
                norm.name,
                f"the running statistics change a normalized value by {overall:.2g} on average "
                f"(its size is 1); channel {worst}: mean off by {float(found.gap[worst]):.2g} "
                f"standard deviations, standard deviation {float(found.ratio[worst]):.3g} times",
                "train first: these are the constructor's values"
                if fresh
                else "nw.recalibrate(model, data)",
                severity="info" if fresh else "error" if overall > _ERROR + allowed else None,
                confidence="high" if samples >= 100 else None,
                repair=None
                if fresh
                else Repair(False, "take the statistics anew from the data", recalibrate=True),
                effect=overall,
                gap=float(found.gap.square().mean().sqrt()),
                log_variance_ratio=float(2 * found.ratio.log().abs().mean()),
                worst_channel=worst,
                samples=samples,
                output_gap=dynamics.gap,
            )
