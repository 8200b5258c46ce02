from __future__ import annotations

import math
from collections.abc import Iterator

from normwise.doctor.figures import first
from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["VanishingGamma"]

# A thousandth of the layer's largest γ, 60 dB below: a millionth of its energy.
_SMALL = 1e-3


class VanishingGamma(Rule):
    """## What it finds
    Scales γ that are 0, or under a thousandth of the layer's largest. It says which case it is:
    all of them 0 with β at 0 is a residual branch that was initialized to nothing and not trained
    (info); exact zeros in some channels are pruned (info); small values are decayed, a warning if
    they are half of the layer or more. All 0 with a trained β (warning): the layer gives constants.

    ## Why it is bad
    A channel with γ = 0 is β, whatever comes in, and the layers before it get no gradient through
    it. Zero initialization of the last γ of a residual block is good practice and ends with the
    first steps; if it is still there after training, the branch was never trained. Weight decay on
    γ takes channels there that the loss does not hold (NW116). Pruning by γ does it on purpose.

    ## Example
    ```python
    bn = torch.nn.BatchNorm2d(8)
    torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
    with torch.no_grad():
        bn.weight[:6] *= 1e-6  # where weight decay met no resistance
    nw.check(bn)
    ```

    ## Remedy
    Decayed: no weight decay on γ and β. Pruned: remove the channels, they cost as much as others.
    Zero-initialized and trained: check that the optimizer has the parameter and the branch runs.

    ## Sources
    Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 5.1 (zero-init residual); Liu et al.
    2017, "Learning Efficient Convolutional Networks through Network Slimming", section 3.
    """

    code = "NW106"
    name = "vanishing-gamma"
    severity = "warning"

    def check(self, subject: Subject) -> Iterator[Finding]:
        for norm in subject:
            gamma = norm.gamma
            # In layer and RMS norm single features are switched off on purpose of the training.
            if gamma is None or norm.kind in ("layer_norm", "rms_norm") or not gamma.numel():
                continue
            size = gamma.abs()
            largest = float(size.max())
            zeros = int((size == 0).sum())
            small = size <= _SMALL * largest
            count, of = int(small.sum()), gamma.numel()
            if not count or not math.isfinite(largest):  # which is NW101's
                continue
            if largest == 0:
                idle = norm.beta is None or not bool(norm.beta.any())
                cause = "zero-init residual, never trained" if idle else "constant output"
                fact = "γ is 0 in all channels" + (
                    ": as initialized (zero-init residual), not trained since"
                    if idle
                    else " and β is not: the layer gives constants"
                )
                severity = "info" if idle else "warning"
                remedy = "nothing if it is new; else see that the optimizer holds γ"
            elif zeros == count:
                cause, severity = "pruned", "info"
                fact = f"γ is exactly 0 in {count} of {of} channels: pruned"
                remedy = "remove the channels: they cost as much as the others"
            else:
                cause = "decayed"
                severity = "warning" if 2 * count >= of else "info"
                fact = (
                    f"γ is under {_SMALL:g} of the layer's largest ({largest:.3g}) in {count} of "
                    f"{of} channels, exactly 0 in {zeros}"
                )
                remedy = "no weight decay on γ and β; remove channels that do nothing"
            yield self.finding(
                norm.name,
                fact,
                remedy,
                severity=severity,
                confidence="high" if cause in ("pruned", "constant output") else "medium",
                cause=cause,
                channels=count,
                zeros=zeros,
                of=of,
                largest=largest,
                which=first(small),
            )
