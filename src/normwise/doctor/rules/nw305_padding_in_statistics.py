from __future__ import annotations

from collections.abc import Iterator

from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["PaddingInStatistics"]

# A tenth of the positions: by then the mean is off by a tenth of the way to the padding's value.
_SHARE = 0.1
_LONG = 8  # positions: shorter sequences end on equal values by chance


class PaddingInStatistics(Rule):
    """## What it finds
    A batch norm over sequences, without a mask, whose inputs end on runs of identical vectors:
    padding that was averaged in.

    ## Why it is bad
    Padding pulls the mean towards its value and shrinks the variance. How much depends on what the
    batch's longest sequence was, so the same sequence gets another output in another batch, and
    the running statistics are those of a mixture that depends on the batch size.

    ## Example
    ```python
    x = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).transpose(1, 2)
    bn(x)                        # zeros counted as data
    ```

    ## Remedy
    ``nw.nn.BatchNorm1d`` with ``bn(x, lengths=lengths)`` or ``bn(x, mask=mask)``; then
    ``nw.recalibrate`` for statistics that were taken with padding.

    ## Sources
    Moments of the valid elements only: docs/layers.md (masks); ``torch.nn.utils.rnn.pad_sequence``.
    """

    code = "NW305"
    name = "padding-in-statistics"
    severity = "warning"
    confidence = "medium"
    needs = "data"

    def check(self, subject: Subject) -> Iterator[Finding]:
        dynamics = subject.dynamics
        assert dynamics is not None
        for norm in subject.norms:
            seen = dynamics.evaluated.get(norm.name)
            if norm.kind != "batch_norm" or seen is None or seen.repeated < _SHARE:
                continue
            axis = getattr(norm.module, "channel_dim", 1) % 3
            if max(s[3 - axis] for s in seen.shapes if len(s) == 3) < _LONG:
                continue
            yield self.finding(
                norm.name,
                f"up to {seen.repeated:.0%} of the positions of a batch repeat the last vector of "
                "their sequence: padding, counted as data",
                "bn(x, lengths=lengths) of nw.nn.BatchNorm1d, then nw.recalibrate",
                share=seen.repeated,
                shape=list(seen.shapes[0]),
            )
