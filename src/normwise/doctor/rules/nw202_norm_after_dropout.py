from __future__ import annotations

from collections.abc import Iterator

from normwise.doctor.calls import dropout_probability
from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.structure import Structure
from normwise.doctor.subject import Subject
from normwise.graph.record import Node, Value

__all__ = ["NormAfterDropout"]


def _dropouts(structure: Structure, value: Value, depth: int = 3) -> Iterator[tuple[Node, float]]:
    """The dropouts whose result reaches ``value`` unweighted, also through a concatenation."""
    for node in structure.before(value):
        p = dropout_probability(node)
        if p:
            yield node, p
        elif node.name in ("cat", "concat", "concatenate") and depth:
            for part in node.inputs:
                yield from _dropouts(structure, part, depth - 1)


class NormAfterDropout(Rule):
    """## What it finds
    A batch norm whose input comes out of a dropout, with nothing between that weighs it.

    ## Why it is bad
    Dropout keeps the mean between training and eval, not the variance: in training a value x is 0
    or x/(1−p), with second moment E[x²]/(1−p). The running variance remembers the larger one, and
    divides in eval by too much: for values of mean 0 by 1/√(1−p), which is 1.41 at p = 0.5.

    ## Example
    ```python
    torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(128))
    ```

    ## Remedy
    Dropout after the last batch norm, or none (batch norm regularizes too); or
    ``nw.recalibrate(model, data)`` at the end, which takes the statistics in eval mode, without
    dropout.

    ## Sources
    Li, Chen, Hu & Yang 2019, *Understanding the Disharmony between Dropout and Batch Normalization
    by Variance Shift*, section 3.
    """

    code = "NW202"
    name = "norm-after-dropout"
    severity = "warning"
    needs = "graph"

    def check(self, subject: Subject) -> Iterator[Finding]:
        structure = subject.structure
        assert structure is not None
        for norm in structure.norms:
            state = subject.by_name.get(norm.name)
            if state is None or not state.has_statistics:
                continue
            found = [d for site in norm.sites for d in _dropouts(structure, site.x)]
            if not found:
                continue
            node, p = max(found, key=lambda d: d[1])
            before = structure.path_of(structure.module_of(node)) or node.name
            yield self.finding(
                norm.name,
                f"dropout ({before}, p = {p:g}) feeds it: in training the second moment is "
                f"{1 / (1 - p):.3g} times that of eval"
                if p < 1
                else f"dropout ({before}, p = 1) feeds it: in training all is 0",
                "dropout after the last batch norm, or nw.recalibrate at the end of training",
                before=before,
                p=p,
                second_moment_ratio=1 / (1 - p) if p < 1 else None,
            )
