from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from normwise.doctor.figures import eps_of
from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import NormState, Subject

__all__ = ["RankDivergence"]

# Ranks that start each forward from rank 0's buffers differ by one update of one batch: with
# momentum 0.1 and 32 values a channel by sqrt(2) 0.1 / sqrt(32) = 0.025 standard deviations. Four
# times that is another population, or buffers that nobody synchronises.
_LARGE = 0.1


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


class RankDivergence(Rule):
    """## What it finds
    With ``peers=`` (checkpoints of other ranks): running statistics that differ while all weights
    and biases of the norms are the same, so that it is the same step. Checkpoints with other
    weights are of another step, and are not compared.

    ## Why it is bad
    Ranks have one model but each its own batches. Without ``SyncBatchNorm`` every rank keeps its
    own running statistics, and the file that is saved holds those of one rank, mostly the first:
    eval then depends on which part of the data that rank saw. ``broadcast_buffers=True`` only
    overwrites the others by the first; turned off, they drift apart for the whole training.

    ## Example
    ```python
    ranks = [torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)]
    for rank, bn in enumerate(ranks):
        for _ in range(100):
            bn(torch.randn(32, 4) + rank)  # the data are sorted by rank
    nw.check(ranks[0], peers=ranks[1:])
    ```

    ## Remedy
    Synchronised statistics in training (``nw.convert(model, "sync")``), or one pass over the data
    of all ranks before saving: ``nw.recalibrate(model, data, group=...)``.

    ## Sources
    ``torch.nn.parallel.DistributedDataParallel``, broadcast_buffers; ``torch.nn.SyncBatchNorm``;
    Wu & Johnson 2021, "Rethinking Batch in BatchNorm", section 3.
    """

    code = "NW113"
    name = "rank-divergence"
    severity = "warning"
    needs = "peers"

    def check(self, subject: Subject) -> Iterator[Finding]:
        peers = {
            name: norms for name, norms in subject.peers.items() if self._same_step(subject, norms)
        }
        for norm in subject.batch_norms():
            gaps = {
                name: gap
                for name, norms in peers.items()
                if (other := norms.get(norm.name)) is not None
                and (gap := _gap(norm, other)) is not None
            }
            if not gaps:
                continue
            worst = max(gaps, key=lambda name: max(gaps[name]))
            mean, log_ratio = gaps[worst]
            yield self.finding(
                norm.name,
                f"the running statistics are not those of {worst}, with the same weights: means "
                f"differ by up to {mean:.3g} standard deviations, variances by a factor of "
                f"{2.718281828**log_ratio:.3g}",
                "synchronise the statistics, or recalibrate over the data of all ranks",
                severity="warning" if max(mean, log_ratio) > _LARGE else "info",
                mean_gap=mean,
                log_variance_ratio=log_ratio,
                peer=worst,
                peers=len(gaps),
            )

    def _same_step(self, subject: Subject, peer: dict[str, NormState]) -> bool:
        """Whether the parameters are the same; a model whose norms have none cannot be told."""
        pairs = [(n, peer[n.name]) for n in subject.norms if n.name in peer]
        known = any(n.weight is not None or n.bias is not None for n, _ in pairs)
        return known and all(_same(a.weight, b.weight) and _same(a.bias, b.bias) for a, b in pairs)


def _gap(norm: NormState, other: NormState) -> tuple[float, float] | None:
    """The largest gap of the means, in standard deviations, and of the variances, as a logarithm;
    None if the means are the same: ranks with the same means differ in convention (NW118)."""
    a, b, va, vb = norm.mean, other.mean, norm.var, other.var
    if a is None or b is None or va is None or vb is None or a.shape != b.shape:
        return None
    if torch.equal(a, b) or not bool(torch.isfinite(a - b).all() & torch.isfinite(va - vb).all()):
        return None
    eps = eps_of(norm)
    va, vb = va.clamp(min=0) + eps, vb.clamp(min=0) + eps
    return float(((a - b).abs() / va.sqrt()).max()), float((va / vb).log().abs().max())
