from __future__ import annotations

from collections.abc import Iterator

from normwise.doctor.calls import is_convolution, is_linear, weight_of
from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import Subject

__all__ = ["SharedConvolution"]


class SharedConvolution(Rule):
    """## What it finds
    A convolution or linear layer that feeds several batch norms, or a batch norm and something
    else: its weight is used more than once, or its output is read by others too.

    ## Why it is bad
    The model is right; what comes next may break it. Folding a norm into that weight changes the
    other users, and tools that fold by looking at neighbours in a list do it silently.

    ## Example
    ```python
    # A detection head: one convolution over all levels, a norm for each.
    for x, bn in zip(levels, self.norms):
        y.append(bn(self.conv(x)))
    ```

    ## Remedy
    ``nw.fold`` sees it and leaves a multiply-add instead of folding; if another tool folds, leave
    this layer out.

    ## Sources
    Tan, Pang & Le 2020, *EfficientDet*, section 4 (heads shared by the levels); docs/fold.md.
    """

    code = "NW204"
    name = "shared-convolution"
    severity = "info"
    needs = "graph"

    def check(self, subject: Subject) -> Iterator[Finding]:
        structure = subject.structure
        assert structure is not None
        for norm in structure.norms:
            node = norm.sites[0].x.maker
            if node is None or not (is_convolution(node) or is_linear(node)):
                continue
            weight = weight_of(node)
            if weight is None or weight.tensor is None:
                continue
            calls = len(structure.trace.uses.get(id(weight.tensor), []))
            readers = len(node.outputs[0].readers)
            if calls <= len(norm.sites) and readers == 1:
                continue
            before = structure.path_of(structure.module_of(node)) or node.name
            how = (
                f"is called {calls} times"
                if calls > len(norm.sites)
                else (f"is read by {readers} layers")
            )
            yield self.finding(
                norm.name,
                f"{before}, which feeds it, {how}: a norm folded into its weight would change "
                "the others",
                "nw.fold, which sees it; leave it out where another tool folds",
                before=before,
                calls=calls,
                readers=readers,
            )
