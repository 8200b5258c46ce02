from __future__ import annotations

from collections.abc import Iterator

import torch

from normwise.doctor.finding import Finding, Repair
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["NonFiniteBuffer"]


class NonFiniteBuffer(Rule):
    """## What it finds
    A running mean, a running variance, a weight or a bias that holds NaN or an infinity.

    ## Why it is bad
    In eval mode every output of these channels is NaN. In training nothing shows: the batch's own
    statistics normalize, and an exponential average that met one NaN stays NaN for ever, since
    (1 - m) · NaN + m · batch is NaN. One bad batch is enough.

    ## Example
    ```python
    bn = torch.nn.BatchNorm2d(8)
    bn(torch.full((2, 8, 4, 4), float("inf")))  # one bad batch: the statistics never recover
    nw.check(bn)
    ```

    ## Remedy
    Recalibrate (``nw.recalibrate(model, data)``): statistics are taken anew. For a weight or a bias
    there is no way back but an earlier checkpoint. ``nw.nn.BatchNorm2d(8, nonfinite="skip")`` keeps
    such a batch out in the first place.

    ## Sources
    Ioffe & Szegedy 2015, algorithm 2; ``torch.nn.BatchNorm2d``, the update rule.
    """

    code = "NW101"
    name = "non-finite-buffer"
    severity = "error"

    def check(self, subject: Subject) -> Iterator[Finding]:
        for norm in subject:
            for tensor in ("running_mean", "running_var", "weight", "bias"):
                values = getattr(norm, tensor)
                if values is None or not values.is_floating_point():
                    continue
                bad = int((~torch.isfinite(values)).sum())
                if bad:
                    yield self.finding(
                        norm.name,
                        f"{tensor} holds {bad} of {values.numel()} values that are not finite",
                        "recalibrate on clean data"
                        if tensor.startswith("running")
                        else "go back to a checkpoint before the divergence",
                        # In eval mode the channel is NaN, so there is nothing to lose.
                        repair=Repair(True, "takes the running statistics anew", recalibrate=True)
                        if tensor.startswith("running") and norm.kind == "batch_norm"
                        else None,
                        tensor=tensor,
                        channels=bad,
                        of=values.numel(),
                    )
