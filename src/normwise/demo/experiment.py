"""The demo as a function: data, training, verification, picture."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from ..errors import InputError, message
from ..files import write_atomically
from .data import load_digits
from .isolation import isolated
from .network import NORMS, NORMWISE
from .output import HINT, PAGE_HINT, prepare
from .requirements import require
from .result import DemoResult, summarize
from .settings import FULL, QUICK
from .train import train

__all__ = ["PICTURE", "run"]

PICTURE = "batch-norm.png"


def run(
    quick: bool = False,
    seed: int = 0,
    out: str | os.PathLike[str] | None = "normwise-demo",
    *,
    page: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DemoResult:
    """Trains the network of Ioffe & Szegedy (2015), figure 1, without and with batch norm.

    Three networks on scikit-learn's handwritten digits, from the same weights and on the same
    batches: without normalization, with ``torch.nn.BatchNorm1d``, with
    ``normwise.nn.BatchNorm1d``. Everything but the times is determined by ``seed``. The caller's
    random state, threads and gradient mode stay as they were.

    Args:
        quick: 500 steps instead of 3,000.
        seed: Of the split, the weights and the order of the batches; an integer >= 0.
        out: Directory for the picture ``batch-norm.png``, made if need be; None draws none.
        page: A file for one HTML page of everything: the training, and what check, recalibrate and
            fold make of the trained network with normwise's batch norm. None writes none.
        progress: Called as ``progress(steps_done, steps)`` while training.

    Returns:
        The result; ``result.passed`` says whether the two batch norms agree.

    Raises:
        InputError: ``seed`` is not an integer >= 0.
        MissingDependencyError: scikit-learn, or matplotlib for the picture, is missing.
        OutputError: ``out`` or ``page`` cannot be made or written to.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(message("seed must be an integer >= 0", repr(seed), "seed=0"))
    if out is None:
        require("sklearn")
    else:
        require("sklearn", "matplotlib")
    directory = None if out is None else prepare(out)
    if page is not None:
        prepare(Path(page).parent, PAGE_HINT)
    settings = QUICK if quick else FULL
    # Independent streams: the next seed does not split by this one's weights.
    split, weights, order = (int(word) for word in np.random.SeedSequence(seed).generate_state(3))

    with isolated():
        digits = load_digits(settings.train_images, settings.test_images, split)
        start = perf_counter()
        histories = train(
            NORMS, settings, digits, weights_seed=weights, order_seed=order, progress=progress
        )
        seconds = perf_counter() - start
        network = histories[NORMWISE].network
        if page is not None:
            assert network is not None
            from .aftercare import aftercare  # the tools are for those who want the page

            care = aftercare(network, digits, settings.batch)

    result = summarize(
        histories, seed=seed, quick=quick, settings=settings, seconds=seconds, picture=None
    )
    if directory is not None:
        # matplotlib takes a while to import and is not needed by those who want no picture.
        from .picture import draw

        result = replace(result, picture=directory / PICTURE)
        write_atomically(directory / PICTURE, lambda file: draw(result, file), HINT)
    if page is not None:
        from ..report import save

        result = replace(result, page=Path(page), aftercare=care)
        save(page, result, care.check, care.recalibration, care.fold, title="normwise demo")
    return result
