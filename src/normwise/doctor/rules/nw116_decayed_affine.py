from __future__ import annotations

from collections.abc import Iterator

from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["DecayedAffine"]


class DecayedAffine(Rule):
    """## What it finds
    With ``optimizer=``: weight decay on the scale γ or the shift β of norms.

    ## Why it is bad
    Decay on the weights *before* a norm acts as a schedule of the effective learning rate. On γ and
    β it has no such effect: it pulls the scale of every channel to 0, where the channel is off
    (NW106), and the gain is small at best. Recipes for large batches and for transformers leave γ,
    β and biases out. Many good models were trained with it, hence the low confidence.

    ## Example
    ```python
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
    nw.check(model, optimizer=optimizer)
    ```

    ## Remedy
    Two groups:
    ``[{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]``, where the vectors are the
    parameters of one dimension.

    ## Sources
    Jia et al. 2018, "Highly Scalable Deep Learning Training System with Mixed-Precision"; He et
    al. 2019, "Bag of Tricks for Image Classification", section 3.1; van Laarhoven 2017,
    "L2 Regularization versus Batch and Weight Normalization".
    """

    code = "NW116"
    name = "decayed-affine"
    severity = "warning"
    confidence = "low"
    needs = "optimizer"

    def check(self, subject: Subject) -> Iterator[Finding]:
        assert subject.optimizer is not None
        decay = {
            id(p): float(group.get("weight_decay", 0) or 0)
            for group in subject.optimizer.param_groups
            for p in group["params"]
        }
        found: dict[str, float] = {}
        affine = 0
        for norm in subject:
            own = [] if norm.module is None else list(norm.module.parameters(recurse=False))
            affine += bool(own)
            if (most := max((decay.get(id(p), 0.0) for p in own), default=0.0)) > 0:
                found[norm.name] = most
        if found:  # one finding: it is one setting of the optimizer, not a fault of each layer
            yield self.finding(
                "",
                f"weight decay {max(found.values()):g} on γ or β of {len(found)} of {affine} "
                f"norms: {', '.join(list(found)[:3])}{', …' if len(found) > 3 else ''}",
                "a group of the optimizer for vectors, with weight_decay=0",
                norms=len(found),
                of=affine,
                weight_decay=max(found.values()),
                layers=list(found)[:8],
            )
