from __future__ import annotations

from collections.abc import Iterator

from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["NonFiniteInput"]


class NonFiniteInput(Rule):
    """## What it finds
    The first norm, in the order in which they run, that sees NaN or an infinity in eval mode.

    ## Why it is bad
    In training one such value makes the statistics of its channel NaN, the running ones for good.
    The layers after it see NaN too and are not named: the fault is before this one.

    ## Example
    ```python
    x = x / x.norm(dim=1, keepdim=True)  # 0 / 0 for a black image
    ```

    ## Remedy
    Look at what comes before the layer: a division, a logarithm, a half-precision overflow (the
    largest finite value seen is in the evidence; float16 ends at 65,504). ``nonfinite="raise"`` of
    ``nw.nn.BatchNorm2d`` names the batch; ``nonfinite="skip"`` keeps it out of the statistics.

    ## Sources
    Micikevicius et al. 2018, *Mixed Precision Training*, section 3.2.
    """

    code = "NW306"
    name = "non-finite-input"
    severity = "error"
    needs = "data"

    def check(self, subject: Subject) -> Iterator[Finding]:
        dynamics = subject.dynamics
        assert dynamics is not None
        for name in dynamics.order:
            seen = dynamics.evaluated[name]
            if seen.nonfinite:
                yield self.finding(
                    name,
                    f"{seen.nonfinite} values of its input are not finite",
                    "look at what comes before this layer, in the data first",
                    values=seen.nonfinite,
                    largest_finite=seen.largest,
                    dtypes=sorted(map(str, seen.dtypes)),
                )
                return
