"""Trains several networks in step with each other and records what figure 1 needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .data import Digits
from .network import Norm, SigmoidNetwork
from .settings import Settings

__all__ = ["PERCENTILES", "History", "train"]

PERCENTILES = (15, 50, 85)
"""Those of figure 1 (b, c) of the paper."""


@dataclass
class History:
    """One network's training. ``looks`` are the steps after which the test images were shown."""

    losses: list[float] = field(default_factory=list)
    """Cross-entropy of each training batch, before that batch's update."""
    step_seconds: list[float] = field(default_factory=list)
    """Wall time of each step: forward, loss, backward and update."""
    looks: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    """Share of the test images classified right, in eval mode."""
    test_losses: list[float] = field(default_factory=list)
    sigmoid_inputs: list[NDArray[np.float32]] = field(default_factory=list)
    """(3, units) a look: percentiles over the test images of what goes into the last sigmoids."""
    network: SigmoidNetwork | None = field(default=None, repr=False, compare=False)
    """As it is after the last step, in training mode."""


def _percentiles(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(images, units) to (3, units), by nearest rank: torch.quantile takes eight times as long."""
    ranks = [round(q / 100 * (len(values) - 1)) for q in PERCENTILES]
    ordered = np.sort(np.ascontiguousarray(values.T), axis=1)
    return np.ascontiguousarray(ordered[:, ranks].T)


class _Learner:
    """A network under plain stochastic gradient descent."""

    def __init__(self, norm: Norm, settings: Settings, seed: int) -> None:
        self.network = SigmoidNetwork(norm, settings, seed)
        self.parameters = tuple(self.network.parameters())
        self.rate = settings.learning_rate
        self.history = History(network=self.network)

    def step(self, images: Tensor, classes: Tensor) -> None:
        start = perf_counter()
        loss = F.cross_entropy(self.network(images), classes)
        gradients = torch.autograd.grad(loss, self.parameters)
        # Written out, w <- w - rate * dw costs less than an optimizer object and hides nothing.
        with torch.no_grad():
            for weight, gradient in zip(self.parameters, gradients, strict=True):
                weight.sub_(gradient, alpha=self.rate)
        self.history.step_seconds.append(perf_counter() - start)
        self.history.losses.append(loss.item())

    @torch.no_grad()
    def look(self, step: int, images: Tensor, classes: Tensor) -> None:
        self.network.eval()
        inputs = self.network.to_last_sigmoid(images)
        scores = self.network.to_classes(inputs)
        self.network.train()
        right = scores.argmax(dim=1) == classes
        self.history.looks.append(step)
        self.history.accuracies.append(int(right.sum()) / len(classes))
        self.history.test_losses.append(F.cross_entropy(scores, classes).item())
        self.history.sigmoid_inputs.append(_percentiles(inputs.numpy()))


def train(
    norms: Mapping[str, Norm],
    settings: Settings,
    digits: Digits,
    *,
    weights_seed: int,
    order_seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, History]:
    """Trains a network for each of ``norms``, step i of each before step i + 1 of any.

    All start from the same weights and see the same batches. A slow spell of the machine meets
    them all alike, and the one that goes first changes from step to step, so that their step times
    can be compared. ``progress(done, steps)`` is called at each look at the test images.
    """
    learners = {name: _Learner(norm, settings, weights_seed) for name, norm in norms.items()}
    queue = list(learners.values())
    generator = torch.Generator().manual_seed(order_seed)
    batches: list[Tensor] = []
    for step in range(settings.steps + 1):
        if step % settings.look_every == 0:
            for learner in queue:
                learner.look(step, digits.test_images, digits.test_classes)
            if progress is not None:
                progress(step, settings.steps)
        if step == settings.steps:
            break
        if not batches:
            order = torch.randperm(len(digits.train_images), generator=generator, device="cpu")
            whole = len(order) - len(order) % settings.batch
            batches = list(order[:whole].view(-1, settings.batch))
        batch = batches.pop()
        images, classes = digits.train_images[batch], digits.train_classes[batch]
        for learner in queue:
            learner.step(images, classes)
        queue.append(queue.pop(0))
    return {name: learner.history for name, learner in learners.items()}
