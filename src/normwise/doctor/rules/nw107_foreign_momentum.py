from __future__ import annotations

import math
from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normwise.doctor.figures import DEFAULT_MOMENTUM
from normwise.doctor.finding import Finding, Repair
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["ForeignMomentum"]

# The decays that papers and other frameworks use; in torch.nn one writes 1 minus these.
_DECAYS = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.997, 0.999, 0.9993, 0.9997, 0.9999)


class ForeignMomentum(Rule):
    """## What it finds
    A ``momentum`` of 0.5 or more, or of 0, or outside of 0 to 1. Not ``momentum=None``, which is
    the plain average.

    ## Why it is bad
    torch.nn's momentum m is the weight of the *new* batch: running = (1 - m)·running + m·batch. In
    Keras, Flax, Paddle, ONNX and the paper it is the weight of the old value. A ported 0.99 keeps
    1 % of the past: the running statistics are those of the last batch, and eval accuracy jumps
    from step to step. The number of batches that an average holds is about 2 / m - 1: 19 for 0.1,
    1.02 for 0.99. With 0 the statistics never move; below 0 or above 2 they diverge.

    ## Example
    ```python
    bn = torch.nn.BatchNorm2d(8, momentum=0.99)  # Keras' default, which is 0.01 here
    nw.check(bn)
    ```

    ## Remedy
    ``momentum = 1 - momentum`` (the unsafe fix: eval changes only after further training). If the
    model trained with the wrong one, recalibrate: ``nw.recalibrate(model, data)``. To freeze
    statistics, say so: ``update_stats=False`` or ``nw.convert(model, "frozen")``.

    ## Sources
    ``torch.nn.BatchNorm2d``, the note on momentum; ``keras.layers.BatchNormalization``, the
    argument momentum; ``normwise.interop.conventions``.
    """

    code = "NW107"
    name = "foreign-momentum"
    severity = "warning"

    def check(self, subject: Subject) -> Iterator[Finding]:
        for norm in subject.batch_norms():
            m = norm.momentum
            # A layer of constants has no average (FrozenBatchNorm says 0.0).
            if m is None or not isinstance(norm.module, (_BatchNorm, _InstanceNorm, type(None))):
                continue
            if not 0 <= m <= 1:
                yield self.finding(
                    norm.name,
                    f"momentum={m:g} is no weight: the running statistics diverge or turn negative",
                    f"momentum={DEFAULT_MOMENTUM}",
                    severity="error",
                    repair=_repair(DEFAULT_MOMENTUM),
                    momentum=m,
                )
            elif m == 0:
                frozen = not norm.untouched
                yield self.finding(
                    norm.name,
                    "momentum=0: the running statistics never move"
                    + ("" if frozen else ", and are still the constructor's, 0 and 1"),
                    "nw.convert(model, 'frozen') if they are to be frozen, else momentum=0.1",
                    severity="info" if frozen else "warning",
                    confidence="medium",
                    repair=None if frozen else _repair(DEFAULT_MOMENTUM),
                    momentum=m,
                )
            elif m >= 0.5:
                known = any(math.isclose(m, decay, abs_tol=1e-9) for decay in _DECAYS)
                other = round(1 - m, 10)
                better = other if 0 < other < 0.5 else DEFAULT_MOMENTUM
                batches = 2 / m - 1
                yield self.finding(
                    norm.name,
                    f"momentum={m:g} is the weight of the new batch: the running statistics are an "
                    f"average of about {batches:.2g} batches",
                    f"momentum={better:g}, if {m:g} was meant as the weight of the old value; then "
                    "recalibrate",
                    confidence="high" if known else "medium",
                    repair=_repair(better),
                    momentum=m,
                    batches=batches,
                    other=other,
                )


def _repair(momentum: float) -> Repair:
    return Repair(False, f"sets momentum={momentum:g}", attributes={"momentum": momentum})
