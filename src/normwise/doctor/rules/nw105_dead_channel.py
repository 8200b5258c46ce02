from __future__ import annotations

from collections.abc import Iterator

import torch

from normwise.doctor.figures import dead, eps_of, first, nonzero_median
from normwise.doctor.finding import Finding, Repair
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["DeadChannel"]

# Between live channels |γ|/σ differs by small factors: the largest is 1.6 times the median in the
# trained network of the tests. A dead channel with a usual γ stands out by the σ of the others over
# sqrt(eps), 316 where that is 1.
_LIMIT = 100.0


class DeadChannel(Rule):
    """## What it finds
    Channels whose running variance is within 10·eps of zero: their input is constant. And channels
    that are scaled by |γ|/σ more than 100 times as much as usual in the layer (warning): what
    little differs from the constant comes out large.

    ## Why it is bad
    A dead channel carries no information and costs as much as any other: mostly a unit whose ReLU
    never opens, or a filter that weight decay took to 0. Where γ is not small as well, the layer
    multiplies by up to |γ| / sqrt(eps), 316·|γ| for eps = 1e-5: data of another kind, another
    resolution, or rounding in half precision, become the largest values of the network. After a
    fold this factor stands in the weights and spoils their int8 range.

    ## Example
    ```python
    bn = torch.nn.BatchNorm2d(8)
    for _ in range(200):
        x = torch.randn(16, 8, 4, 4)
        x[:, 3] = 0.0  # a unit that never opens
        bn(x)
    nw.check(bn)  # channel 3: variance 7e-10, scaled by 316
    ```

    ## Remedy
    If the channel is to live: a lower learning rate, a leaky activation, warm-up. If not: prune it,
    or set γ to 0 there (the unsafe fix), so that it gives its β whatever comes in.

    ## Sources
    Lu et al. 2020, "Dying ReLU and Initialization"; Liu et al. 2017, "Learning Efficient
    Convolutional Networks through Network Slimming", section 3; Yvinec et al. 2022, "To Fold or Not
    to Fold".
    """

    code = "NW105"
    name = "dead-channel"
    severity = "warning"

    def check(self, subject: Subject) -> Iterator[Finding]:
        for norm in subject.batch_norms():
            assert norm.var is not None
            low = dead(norm)
            # Variances that are low all over are a matter of scale (NW110), not of channels, unless
            # they are so low that eps alone is left.
            if 2 * int(low.sum()) >= low.numel():
                low &= norm.var <= 0.01 * eps_of(norm)
            gamma = torch.ones_like(norm.var) if norm.gamma is None else norm.gamma.abs()
            low &= gamma != 0  # gives β, whatever comes in
            scale = gamma * (norm.var + eps_of(norm)).clamp(min=0).rsqrt()
            usual = nonzero_median(scale)
            loud = (scale > _LIMIT * usual) & scale.isfinite() & (norm.var >= 0)
            which = low | loud
            count = int(which.sum())
            if not count:
                continue
            largest = float(scale[which].max())
            weight = norm.weight
            yield self.finding(
                norm.name,
                f"{int(low.sum())} of {low.numel()} channels are constant (variance down to "
                f"{float(norm.var[which].min()):.2g}), {int(loud.sum())} are scaled by more than "
                f"{_LIMIT:.0f} times the median: |γ|/σ up to {largest:.3g}, median {usual:.3g}",
                "prune them, or set γ to 0 there; against dead units, a lower learning rate",
                severity="warning" if loud.any() else "info",
                repair=None
                if weight is None
                else Repair(
                    False,
                    f"sets γ to 0 in {count} channels, which then give β",
                    {"weight": torch.where(which, torch.zeros_like(weight), weight)},
                ),
                constant=int(low.sum()),
                loud=int(loud.sum()),
                of=low.numel(),
                variance=float(norm.var[which].min()),
                scale=largest,
                median=usual,
                which=first(which),
            )
