from __future__ import annotations

from collections.abc import Iterator

from normwise.doctor.calls import bias_of, is_convolution, is_linear
from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.structure import Structure
from normwise.doctor.subject import Subject
from normwise.graph.norms import Site
from normwise.graph.record import Node

__all__ = ["BiasBeforeNorm"]


def _alone(structure: Structure, site: Site, node: Node) -> bool:
    """Whether the call's result goes into this norm and nowhere else, channel by channel."""
    made = node.outputs[0]
    channels = site.axis == 1 if is_convolution(node) else site.axis == len(made.shape) - 1
    return channels and made is site.x and len(made.readers) == 1 and not made.kept


class BiasBeforeNorm(Rule):
    """## What it finds
    A convolution or linear layer with a bias whose output goes into a batch norm and nowhere else.

    ## Why it is bad
    The norm subtracts the mean, and the bias with it: in training it changes nothing, its gradient
    is 0 but for rounding, and weight decay drags it towards 0 while the running mean follows. It
    costs memory, a place in the optimizer and an addition a value.

    ## Example
    ```python
    torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64))  # bias=False
    ```

    ## Remedy
    ``bias=False`` in the layer before. In a trained model: subtract the bias from the running mean
    and drop it; ``nw.fold`` does that and more, for inference.

    ## Sources
    Ioffe & Szegedy 2015, section 3.2: "the bias b can be ignored since its effect will be canceled
    by the subsequent mean subtraction".
    """

    code = "NW201"
    name = "bias-before-norm"
    severity = "info"
    needs = "graph"

    def check(self, subject: Subject) -> Iterator[Finding]:
        structure = subject.structure
        assert structure is not None
        for norm in structure.norms:
            makers = [site.x.maker for site in norm.sites]
            first = makers[0]
            if first is None or not (is_convolution(first) or is_linear(first)):
                continue
            bias = bias_of(first)
            if bias is None or bias.tensor is None:
                continue
            alone = all(
                node is not None and bias_of(node) is bias and _alone(structure, site, node)
                for site, node in zip(norm.sites, makers, strict=True)
            )
            used = structure.trace.uses.get(id(bias.tensor), [])
            if not alone or len(used) != len(makers):
                continue
            before = structure.path_of(structure.module_of(first)) or first.name
            yield self.finding(
                norm.name,
                f"the bias of {before} ({bias.tensor.numel()} values) is subtracted again with the "
                "mean",
                f"bias=False in {before}",
                before=before,
                values=bias.tensor.numel(),
            )
