"""A recalibration that kills its own process in the middle; run by test_recalibrate_exits.py.

Usage: recalibrate_run.py <checkpoint> <mode> <batches until it is killed>
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import torch
from digits import IMAGES, chain
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import normwise as nw
from normwise.tools.recalibrate import checkpoint

SEED = 11


class Loader:
    """Shuffled batches by torch's global seed; counts what it gives, over all passes."""

    def __init__(self, killed_after: int | None = None) -> None:
        self.killed_after, self.given = killed_after, 0
        data = TensorDataset(IMAGES[:400].float())
        self.loader = DataLoader(data, batch_size=40, shuffle=True)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for batch in self.loader:
            if self.given == self.killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
            self.given += 1
            yield batch


if __name__ == "__main__":
    path, mode, after = sys.argv[1:]
    checkpoint._SHARE = 0  # a file after every batch
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    nw.recalibrate(chain(), Loader(int(after)), mode=mode, checkpoint=path)
