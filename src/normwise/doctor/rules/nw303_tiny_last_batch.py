from __future__ import annotations

from collections.abc import Iterator

from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["TinyLastBatch"]

_FEW = 16  # values a channel, as in few-values


class TinyLastBatch(Rule):
    """## What it finds
    A DataLoader without ``drop_last`` whose last batch leaves some batch norm fewer than 16 values
    a channel, where the others leave it enough.

    ## Why it is bad
    The last batch of an epoch weighs as much in the running statistics as any other, 10 % with
    torch.nn's momentum, and it is the freshest when the evaluation comes. With one sample and one
    position torch.nn raises, at the end of the epoch.

    ## Example
    ```python
    DataLoader(dataset_of_1025, batch_size=128, shuffle=True)  # the last batch has one sample
    ```

    ## Remedy
    ``drop_last=True`` for training (not for evaluation), or a batch size that leaves a larger rest.

    ## Sources
    ``torch.utils.data.DataLoader``, ``drop_last``; ``torch.nn.functional.batch_norm``, "Expected
    more than 1 value per channel when training".
    """

    code = "NW303"
    name = "tiny-last-batch"
    severity = "warning"
    needs = "data"

    def check(self, subject: Subject) -> Iterator[Finding]:
        dynamics = subject.dynamics
        assert dynamics is not None
        loader = dynamics.loader
        last = loader.last
        if last is None or not loader.batch_size or last == loader.batch_size:
            return
        smallest: tuple[int, str] | None = None
        for norm in subject.norms:
            seen = dynamics.trained.get(norm.name)
            if norm.kind != "batch_norm" or seen is None or not seen.counts:
                continue
            positions = seen.counts[0] // max(dynamics.batch_sizes[0], 1)
            if positions * loader.batch_size >= _FEW > positions * last:
                smallest = min(smallest or (_FEW, ""), (positions * last, norm.name))
        if smallest is None:
            return
        values, layer = smallest
        yield self.finding(
            layer,
            f"the last batch of {loader.samples} samples in batches of {loader.batch_size} has "
            f"{last}: {values} value{'s' * (values != 1)} a channel",
            "drop_last=True in the DataLoader for training",
            severity="info"
            if loader.shuffled is False
            else "error"
            if values <= 1
            else None,  # not shuffled: most likely the data of an evaluation
            last=last,
            batch_size=loader.batch_size,
            samples=loader.samples,
            values=values,
        )
