"""Keeps the demo from the caller's torch settings, and those from the demo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["isolated"]


@contextmanager
def isolated() -> Iterator[None]:
    """One thread, gradients on, autocast off; on leaving all is as it was, random state included.

    One thread because matrices of 60 x 100 gain nothing from a second: the step times get less
    noisy and the numbers do not depend on how many cores there are. Every draw
    that matters names a generator of its own; the fork is for what ``nn.Linear`` draws in passing.
    """
    threads = torch.get_num_threads()
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
