"""Who is told of the norms' outputs while autograd records: tools listen, functional speaks.

Empty by default: a call then pays one truth test (``if LISTENERS``), and compiled calls none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

__all__ = ["LISTENERS", "Output", "listening", "notify"]


class Output(NamedTuple):
    """One output, and all that determines it: y = ops.normalize of the rest.

    statistics: ``(moments,)`` of the batch, or ``(mean, var)`` where they were given.
    """

    y: Tensor
    x: Tensor
    statistics: tuple[Tensor, ...]
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    channel_dim: int
    eps: float
    activation: str


Listener = Callable[[Output], None]

# Thread -> its listeners, the innermost last; a thread without one has no entry.
LISTENERS: dict[int, list[Listener]] = {}


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener`, and no outer one, of the outputs that this thread makes in the block.

    It is called before autograd saves what the norm's own backward needs, y perhaps included.
    """
    thread = threading.get_ident()
    own = LISTENERS.setdefault(thread, [])
    own.append(listener)
    try:
        yield
    finally:
        own.remove(listener)
        if not own:
            del LISTENERS[thread]


def notify(output: Output) -> None:
    own = LISTENERS.get(threading.get_ident())
    if own:
        own[-1](output)
