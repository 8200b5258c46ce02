"""What the demo trains and for how long: the numbers that can be argued about, with reasons."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "Settings"]


@dataclass(frozen=True)
class Settings:
    """The experiment of Ioffe & Szegedy (2015), section 4.1, on scikit-learn's 8x8 digits.

    Three hidden layers of 100 sigmoid units, 60 images a batch and "small random Gaussian" initial
    weights are the paper's. It names neither the width of that Gaussian nor the learning rate:

    - ``weight_std`` is 0.1, Glorot's for a layer of 100 by 100. The width decides how long a plain
      sigmoid network sits on its first plateau (docs/demo.md has the table): narrower ones favour
      batch norm far more, wider ones less.
    - ``learning_rate`` is 1 for every network, the largest of 0.5, 1, 2, 3, 5 at which the first
      steps let rounding die out. From 2 on they magnify it, at 3 until two right batch norms are as
      far apart as a right and a wrong one, and nothing could be verified. Batch norm gets no rate
      of its own; the network without would need a quarter fewer steps at 3 (docs/demo.md).
    """

    steps: int
    """Updates of the weights, the same for every network."""
    look_every: int
    """Steps from one look at the test images to the next; so the resolution of "steps to 90 %"."""
    batch: int = 60
    hidden_layers: int = 3
    hidden_units: int = 100
    weight_std: float = 0.1
    learning_rate: float = 1.0
    train_images: int = 1200
    """Of the 1,797: 20 batches of 60 an epoch exactly."""
    test_images: int = 597


FULL = Settings(steps=3000, look_every=10)
"""Long enough for the network without normalization to level out (150 epochs)."""

QUICK = Settings(steps=500, look_every=10)
"""A few seconds: long enough for batch norm, not for the network without."""
