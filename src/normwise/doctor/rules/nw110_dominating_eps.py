from __future__ import annotations

from collections.abc import Iterator

from normwise.doctor.figures import dead, eps_of, first
from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["DominatingEps"]


class DominatingEps(Rule):
    """## What it finds
    A layer in which eps is over 10 % of the running variance in half of the channels or more (info;
    a warning where it is larger than the variance in half of them). Constant channels, with a
    variance under eps / 100, are rule NW105's and do not count.

    ## Why it is bad
    The output's deviation is γ·sqrt(σ² / (σ² + eps)): 0.95·γ where eps is a tenth of σ², 0.71·γ
    where it equals it. The layer no longer takes the scale of its input out, which is what made
    training indifferent to it: it depends on the scale of the weights before it, and weight decay
    shrinks the signal instead of raising the effective learning rate. Causes are inputs of a small
    scale (images in [0, 1] times small weights), and an eps of 1e-3 from Keras.

    ## Example
    ```python
    bn = torch.nn.BatchNorm2d(8)
    for _ in range(200):
        bn(torch.randn(16, 8, 4, 4) * 1e-3)  # a variance of 1e-6 beside an eps of 1e-5
    nw.check(bn)
    ```

    ## Remedy
    Scale the input of the layer up (the initialization before it), or choose a smaller eps before
    training. Not after: eps is part of the function that was learned.

    ## Sources
    Ioffe & Szegedy 2015, algorithm 1; van Laarhoven 2017, "L2 Regularization versus Batch and
    Weight Normalization".
    """

    code = "NW110"
    name = "dominating-eps"
    severity = "info"

    def check(self, subject: Subject) -> Iterator[Finding]:
        for norm in subject.batch_norms():
            assert norm.var is not None
            eps = eps_of(norm)
            alive = norm.var > 0.01 * eps
            low = dead(norm) & alive
            if not int(low.sum()) or 2 * int(low.sum()) < low.numel():
                continue
            below = norm.var.clamp(min=0)[low]
            kept = float((below / (below + eps)).sqrt().median())
            half = 2 * int((norm.var[low] < eps).sum()) >= low.numel()
            yield self.finding(
                norm.name,
                f"eps={eps:g} is over a tenth of the running variance in {int(low.sum())} of "
                f"{low.numel()} channels, whose outputs have {kept:.2g} times the deviation γ",
                "a larger scale before the layer, or a smaller eps before training",
                severity="warning" if half else "info",
                # In a checkpoint eps is a guess.
                confidence="high" if norm.eps is not None else "low",
                channels=int(low.sum()),
                of=low.numel(),
                eps=eps,
                variance=float(norm.var[low].median()),
                deviation=kept,
                which=first(low),
            )
