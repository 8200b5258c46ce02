from __future__ import annotations

from collections.abc import Iterator

from normwise.doctor.finding import Finding, Repair
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject
from normwise.interop.conventions import convention

__all__ = ["ForeignEps"]

# An output that is off by 1e-3 shows in no class; below, it is worth knowing.
_SHOWS = 1e-3


class ForeignEps(Rule):
    """## What it finds
    With ``framework=``: an ``eps`` that is not the default of the framework where the weights come
    from (Keras and TF-Slim 1e-3; Flax, Haiku, Paddle, MindSpore, Caffe, ONNX 1e-5).

    ## Why it is bad
    eps stands beside the variance under the root. A Keras model with its 1e-3 replaced by torch's
    1e-5 scales a channel of variance 0.001 by sqrt(0.002 / 0.00101) = 1.41: layer after layer this
    multiplies, and the port is close on layers with large variances and wrong on others.

    ## Example
    ```python
    bn = torch.nn.BatchNorm2d(8)  # weights loaded from Keras; eps stays torch's 1e-5
    bn.running_var.fill_(0.001)
    nw.check(bn, framework="keras")
    ```

    ## Remedy
    ``eps=`` of the source model. Its layers may have been given another than the default
    (keras.applications' ResNets have 1.001e-5): look there before you change it.

    ## Sources
    ``normwise.interop.conventions`` has each framework's figure with the page that says so.
    """

    code = "NW109"
    name = "foreign-eps"
    severity = "warning"
    confidence = "medium"

    def check(self, subject: Subject) -> Iterator[Finding]:
        if subject.framework is None:
            return
        source = convention(subject.framework)
        for norm in subject.batch_norms():
            assert norm.var is not None
            # Two per cent: 1.001e-5 is keras.applications' way to write 1e-5.
            if norm.eps is None or abs(norm.eps / source.eps - 1) <= 0.02:
                continue
            var = norm.var[norm.var.isfinite()].clamp(min=0)
            if not var.numel():
                continue
            off = float((((var + source.eps) / (var + norm.eps)).sqrt() - 1).abs().max())
            yield self.finding(
                norm.name,
                f"eps={norm.eps:g}, while {source.name} has {source.eps:g} by default: outputs "
                f"differ by up to {off:.2%}",
                f"eps={source.eps:g}, unless the source model was given another",
                severity="warning" if off > _SHOWS else "info",
                repair=Repair(False, f"sets eps={source.eps:g}", attributes={"eps": source.eps}),
                eps=norm.eps,
                expected=source.eps,
                framework=source.name,
                difference=off,
            )
