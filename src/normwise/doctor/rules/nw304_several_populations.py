from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import torch

from normwise.doctor.compare import Shift, noise, shift
from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["SeveralPopulations"]

# The root mean square change of a normalized value, as in drifted-statistics.
_WARNING = 0.5


class SeveralPopulations(Rule):
    """## What it finds
    One batch norm that is called several times in a forward, on inputs whose statistics differ: the
    two branches of a siamese network, an encoder on several domains or resolutions, the steps of a
    recurrent network.

    ## Why it is bad
    In training each call normalizes by its own statistics; in eval all of them by one running
    average that fits none. The average is also updated once a call: with k calls its memory is k
    times as short, and the last call weighs most.

    ## Example
    ```python
    def forward(self, photo, sketch):
        return self.encoder(photo), self.encoder(sketch)  # one running mean for both
    ```

    ## Remedy
    Statistics for each population: ``nw.nn.add_domains(model, ["photo", "sketch"])`` and
    ``nw.domain("photo")`` around the call (the weights stay shared), or one call on both
    concatenated.

    ## Sources
    Chang et al. 2019, *Domain-Specific Batch Normalization*; Cooijmans et al. 2017, *Recurrent
    Batch Normalization*, section 3.
    """

    code = "NW304"
    name = "several-populations"
    severity = "warning"
    needs = "data"

    def check(self, subject: Subject) -> Iterator[Finding]:
        dynamics = subject.dynamics
        assert dynamics is not None
        samples = sum(dynamics.batch_sizes)
        for norm in subject.batch_norms():
            seen = dynamics.trained.get(norm.name)
            if seen is None or len(seen.calls) < 2:
                continue
            worst: tuple[Shift, int, int] | None = None
            for (i, a), (j, b) in permutations(enumerate(seen.calls), 2):
                if int(a.count.min()) < 2 or int(b.count.min()) < 2:
                    continue
                found = shift(a, b.mean, b.variance(), norm.eps or 1e-5)
                finite = bool(torch.isfinite(found.effect).all())
                if finite and (worst is None or found.overall > worst[0].overall):
                    worst = (found, i, j)
            if worst is None or worst[0].overall < _WARNING + 2 * noise(samples):
                continue
            found, i, j = worst
            yield self.finding(
                norm.name,
                f"{len(seen.calls)} calls in a forward see different data: the statistics of call "
                f"{j + 1} change a normalized value of call {i + 1} by {found.overall:.2g} (its "
                "size is 1)",
                "statistics for each: nw.nn.add_domains(model, …) and nw.domain(…) at the calls",
                calls=len(seen.calls),
                effect=found.overall,
                gap=float(found.gap.square().mean().sqrt()),
                samples=samples,
            )
