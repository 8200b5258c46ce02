from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["DoubleUpdate"]

# Counts of one loop differ by the few batches of a warm-up or an interrupted step: 1 in 100.
_TOLERANCE = 0.01
# A norm called for each of the frames of a clip is the largest factor that is met.
_LARGEST = 64


class DoubleUpdate(Rule):
    """## What it finds
    A layer whose ``num_batches_tracked`` is twice (three times, …) that of the other layers.

    ## Why it is bad
    Its running statistics move several times a step. With one population (activation checkpointing,
    which runs the forward again in the backward) the effective momentum is 1 - (1 - m)^k: 0.19 for
    m = 0.1 and k = 2, so the average forgets twice as fast and is noisier. With several populations
    (a norm shared by two branches, or by the frames of a clip) training normalizes each by its own
    batch, and eval all by one average that fits none of them; rule NW304 measures that.

    ## Example
    ```python
    model = torch.nn.Sequential(*(torch.nn.BatchNorm1d(4) for _ in range(4)))
    for _ in range(100):
        x = model(torch.randn(8, 4))
        model[3](x * 3)  # shared with another branch
    nw.check(model)
    ```

    ## Remedy
    For activation checkpointing: ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False,
    context_fn=nw.checkpoint_contexts)``. For populations: a norm each, or ``domains=`` with
    ``with nw.domain(name):`` around each call.

    ## Sources
    Chang et al. 2019, "Domain-Specific Batch Normalization for Unsupervised Domain Adaptation";
    Xie et al. 2020, "Adversarial Examples Improve Image Recognition" (an auxiliary norm for the
    second population); ``torch.utils.checkpoint``.
    """

    code = "NW104"
    name = "double-update"
    severity = "warning"
    confidence = "medium"

    def check(self, subject: Subject) -> Iterator[Finding]:
        counted = [n for n in subject.batch_norms() if n.num_batches_tracked]
        if len(counted) < 3:  # of two it cannot be said which is the usual one
            return
        counts = Counter(int(n.num_batches_tracked or 0) for n in counted)
        usual = sorted(counts.elements())[(len(counted) - 1) // 2]
        for norm in counted:
            count = int(norm.num_batches_tracked or 0)
            times = round(count / usual)
            if 2 <= times <= _LARGEST and abs(count / usual - times) <= _TOLERANCE * times:
                yield self.finding(
                    norm.name,
                    f"its statistics were updated {count} times, {times} times as often as usual "
                    f"in this model ({usual})",
                    "a norm or a domain for each population; under activation checkpointing, "
                    "nw.checkpoint_contexts",
                    num_batches_tracked=count,
                    usual=usual,
                    times=times,
                )
        # The stem of a checkpointed network is not recomputed: the few are right, the many doubled.
        # Exactly so, since by chance (a stem that was frozen half way) counts fall close at most.
        for times in (2, 3, 4):
            few = [n.name for n in counted if times * (n.num_batches_tracked or 0) == usual]
            if few:
                yield self.finding(
                    "",
                    f"{counts[usual]} of {len(counted)} norms were updated {usual} times, exactly "
                    f"{times} times as often as {', '.join(few[:3])}",
                    "under activation checkpointing, nw.checkpoint_contexts",
                    confidence="low",
                    usual=usual,
                    times=times,
                    layers=few[:8],
                )
