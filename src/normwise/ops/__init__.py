"""Operators of normwise: one schema, several backends. Functions here are what upper layers call.

``moments``, ``normalize``, ``train_forward``, ``update_running``, ``backward_reduce``,
``backward_input``, ``train_backward``, ``eval_backward``, ``sets_forward``, ``sets_backward``: see
:mod:`normwise.ops.schema` for what each computes. ``train_gradients``, ``eval_gradients``: the body
of an autograd node in one call, where the kernels serve (:mod:`normwise.ops.cpu`).
``ghost_forward``, ``ghost_backward``: the training kernels over ghost batches
(:mod:`normwise.ops.ghost`). ``direct_forward``, ``direct_backward``: whole eager calls of the norms
of sets (:mod:`normwise.ops.sets`).
"""

from normwise.ops.backends import BackendStatus, backends
from normwise.ops.cpu import autograd_options, eval_gradients, train_gradients
from normwise.ops.dispatch import (
    OPERATORS,
    backward_input,
    backward_reduce,
    eval_backward,
    moments,
    normalize,
    sets_backward,
    sets_forward,
    train_backward,
    train_forward,
    update_running,
)
from normwise.ops.ghost import ghost_backward, ghost_forward
from normwise.ops.sets import direct_backward, direct_forward

__all__ = [
    "OPERATORS",
    "BackendStatus",
    "autograd_options",
    "backends",
    "backward_input",
    "backward_reduce",
    "direct_backward",
    "direct_forward",
    "eval_backward",
    "eval_gradients",
    "ghost_backward",
    "ghost_forward",
    "moments",
    "normalize",
    "sets_backward",
    "sets_forward",
    "train_backward",
    "train_forward",
    "train_gradients",
    "update_running",
]
