"""``torch.compile(model, backend="normwise")``: captured graphs with fused norms, run eagerly.

Registered under that name by the package's entry point (group ``torch_dynamo_backends``), so a
program that compiles need not import normwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import fx

from normwise.tools.accelerate.patterns import find, function_norm, rewrite

__all__ = ["normwise"]


def normwise(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend of :func:`torch.compile`: batch norms by our kernels, with what follows them.

    Every ``torch.nn.functional.batch_norm`` of the captured graph, with the addition and the
    activation after it, becomes one call; all else runs as it is, eagerly, autograd included.
    Running statistics move as they would.
    """
    graph = graph_module.graph
    modules = dict(graph_module.named_modules())
    for fusion in find(graph, modules):
        rewrite(graph, fusion)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.batch_norm:
            node.target = function_norm
    graph.lint()
    graph_module.recompile()
    run: Callable[..., Any] = graph_module.forward
    return run
