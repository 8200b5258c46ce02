from __future__ import annotations

from collections.abc import Iterator

from normwise.doctor.figures import eps_of, first
from normwise.doctor.finding import Finding, Repair
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["NegativeVariance"]


class NegativeVariance(Rule):
    """## What it finds
    A running variance below zero.

    ## Why it is bad
    A variance is a mean of squares. Below -eps its channel is NaN in eval mode; between -eps and 0
    the channel is scaled by more than 1 / sqrt(eps), 316 for eps = 1e-5. In training nothing shows,
    since the batch's own variance normalizes.
    It comes from arithmetic on checkpoints (a difference of models, an extrapolated average), from
    E[x²] - E[x]² in low precision, or from a damaged file; no training step of torch.nn makes one.

    ## Example
    ```python
    a, b = torch.nn.BatchNorm2d(8), torch.nn.BatchNorm2d(8)
    b.running_var.fill_(4.0)
    with torch.no_grad():  # "task arithmetic": a - (b - a) / 2
        a.running_var.add_(b.running_var - a.running_var, alpha=-0.5)
    nw.check(a)  # the running variance is -0.5
    ```

    ## Remedy
    Recalibrate (``nw.recalibrate(model, data)``). After arithmetic on weights the old statistics
    fit nothing anyway.

    ## Sources
    Ioffe & Szegedy 2015, algorithm 2. Izmailov et al. 2018, "Averaging Weights Leads to Wider
    Optima and Better Generalization", section 3.2: after averaging, statistics are taken anew.
    """

    code = "NW102"
    name = "negative-variance"
    severity = "error"

    def check(self, subject: Subject) -> Iterator[Finding]:
        for norm in subject.batch_norms():
            assert norm.var is not None
            negative = norm.var < 0
            count = int(negative.sum())
            if not count:
                continue
            nan = int((norm.var + eps_of(norm) <= 0).sum())
            yield self.finding(
                norm.name,
                f"running_var is negative in {count} of {norm.num_features} channels, down to "
                f"{float(norm.var[negative].min()):.3g}; {nan} give NaN in eval mode",
                "recalibrate on the data",
                # Where a channel is NaN the model computes nothing in eval mode, so nothing is
                # lost; a variance in (-eps, 0) gave finite, if absurd, numbers.
                repair=Repair(nan > 0, "takes the running statistics anew", recalibrate=True),
                channels=count,
                of=norm.num_features,
                lowest=float(norm.var[negative].min()),
                nan=nan,
                which=first(negative),
            )
