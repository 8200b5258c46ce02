from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normwise.doctor.finding import Finding, Repair
from normwise.doctor.rule import Rule
from normwise.doctor.subject import NormState, Subject

__all__ = ["ContradictingTracking"]


class ContradictingTracking(Rule):
    """## What it finds
    A ``track_running_stats`` that the buffers contradict: True without buffers (error), False with
    buffers (warning). And batch norms with neither (info): they normalize by the batch in eval
    mode too.

    ## Why it is bad
    torch.nn decides by the buffers, not by the flag. True without buffers: eval normalizes by the
    batch, so the output for one sample depends on the others, and a batch of one value a channel
    fails. With one buffer of two, eval fails outright. False with buffers, mostly set by hand to
    get batch statistics in eval: eval goes on using the buffers, and training no longer moves them,
    so they age unseen.

    ## Example
    ```python
    bn = torch.nn.BatchNorm2d(8)
    bn.track_running_stats = False  # "use the batch in eval": it does not
    nw.check(bn)
    ```

    ## Remedy
    To normalize by the batch in eval mode: buffers and flag off together, as by the constructor's
    ``track_running_stats=False``, or ``normalize_with="batch"`` of normwise's layers, which keeps
    the buffers. To keep running statistics: the flag on.

    ## Sources
    ``torch.nn.BatchNorm2d``, track_running_stats; the forward of ``torch.nn.modules.batchnorm``.
    """

    code = "NW112"
    name = "contradicting-tracking"
    severity = "warning"
    needs = "model"

    def check(self, subject: Subject) -> Iterator[Finding]:
        for norm in subject:
            module = norm.module
            if not isinstance(module, (_BatchNorm, _InstanceNorm)):
                continue
            buffers = [n for n in ("running_mean", "running_var") if getattr(module, n) is not None]
            flag = bool(module.track_running_stats)
            if (flag and len(buffers) < 2) or len(buffers) == 1:
                yield self._missing(norm, flag, buffers)
            elif not flag and buffers:
                yield self.finding(
                    norm.name,
                    "track_running_stats=False, but there are buffers: eval normalizes by them, "
                    "and training does not move them",
                    "remove the buffers too, or set the flag",
                    # The outputs stay the same, but training moves buffers from here on.
                    repair=Repair(
                        False,
                        "sets track_running_stats=True",
                        attributes={"track_running_stats": True},
                    ),
                    track_running_stats=False,
                    buffers=buffers,
                )
            elif not flag and isinstance(module, _BatchNorm):
                yield self.finding(
                    norm.name,
                    "no running statistics: in eval mode the output for a sample depends on the "
                    "others of its batch",
                    "nothing if that is meant; else track_running_stats=True",
                    severity="info",
                    track_running_stats=False,
                    buffers=[],
                )

    def _missing(self, norm: NormState, flag: bool, buffers: list[str]) -> Finding:
        alone = f"only {buffers[0]} is there: eval mode fails" if buffers else None
        return self.finding(
            norm.name,
            f"track_running_stats={flag}, but "
            + (alone or "there are no buffers: eval mode normalizes by the batch"),
            "track_running_stats=False if the batch is to normalize; else the buffers back, from a "
            "checkpoint",
            severity="error",
            # Without both, the flag decides nothing: what is computed stays the same.
            repair=None
            if buffers
            else Repair(
                True,
                "sets track_running_stats=False, as is computed",
                attributes={"track_running_stats": False},
            ),
            track_running_stats=flag,
            buffers=buffers,
        )
