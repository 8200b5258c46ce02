from __future__ import annotations

from collections.abc import Iterator

from normwise.doctor.calls import is_convolution, is_linear, padding_of
from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["NormBeforePadding"]


class NormBeforePadding(Rule):
    """## What it finds
    A batch norm with nothing before it to fold into whose output goes straight into a convolution
    with zero padding.

    ## Why it is bad
    The model is right; folding the norm into that convolution is not: padding puts zeros *after*
    the norm, so its shift β − γ·mean/σ is missing at the border, and a bias that holds it adds it
    there too. The error sits in the outermost pixels of every feature map, where tests on one
    number of the output rarely look.

    ## Example
    ```python
    torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 64, 3, padding=1))
    ```

    ## Remedy
    ``nw.fold`` keeps the border exact with a one-channel convolution of the padding. By hand: pad
    with −shift/scale before an unpadded convolution.

    ## Sources
    docs/fold.md (the border term); Ioffe & Szegedy 2015, section 3.2.
    """

    code = "NW205"
    name = "norm-before-padding"
    severity = "info"
    needs = "graph"

    def check(self, subject: Subject) -> Iterator[Finding]:
        structure = subject.structure
        assert structure is not None
        told = set()
        for norm, site in structure.sites():
            before = site.x.maker
            above = before is not None and (is_convolution(before) or is_linear(before))
            if above or site.activation is not None or norm.name in told:
                continue
            for node in structure.after(site.y):
                padding = padding_of(node)
                if not padding:
                    continue
                told.add(norm.name)
                after = structure.path_of(structure.module_of(node)) or node.name
                yield self.finding(
                    norm.name,
                    f"{after} pads its output with zeros ({padding} at a side): folded into its "
                    "weight alone, the border is wrong",
                    "nw.fold, which keeps the border exact",
                    after=after,
                    padding=padding,
                )
                break
