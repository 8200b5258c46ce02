"""Whether two batch norms trained alike: the part of the demo that can fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .train import History

__all__ = ["TOLERANCE", "VERIFIED_STEPS", "Agreement", "Difference", "compare"]

VERIFIED_STEPS = 300
"""The steps that the verdict is about; later differences are told, not judged.

Two right float32 batch norms round differently, and training carries each rounding on. Mostly it
dies out, but now and then the loss of a network jumps, and the jump magnifies it: torch.nn's layer
against itself, the rows of each batch taken in reverse, is 4e-3 apart at step 2,881 of seed 1.
"""

TOLERANCE = 5e-4
"""The largest difference of two losses (cross-entropy, in nats) allowed in those steps.

Over the seeds 0 to 49 normwise and torch.nn differ by at most 4.3e-6 in them, and the formula
in float64 is as far from torch.nn. Wrong layers differ by far more (seeds 0 to 19, 60 steps): one
that normalizes with the unbiased variance by at least 1.8e-2, one with an epsilon of 1e-3 by
1.4e-2, and one with the biased variance in its running statistics by 7.7e-3, in the test losses.
"""


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference of two curves, and the step it was at."""

    largest: float
    step: int


@dataclass(frozen=True)
class Agreement:
    """How far the losses of two networks that saw the same batches were apart."""

    training_loss: Difference
    """On the training batches, any step: the batch statistics and the gradients."""
    test_loss: Difference
    """On the test images, any look: the running statistics as well."""
    verified_training_loss: Difference
    """As ``training_loss``, within the first ``verified_steps``."""
    verified_test_loss: Difference
    verified_steps: int = VERIFIED_STEPS
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """True if both stay within the tolerance. A loss that is not a number does not."""
        return (
            self.verified_training_loss.largest <= self.tolerance
            and self.verified_test_loss.largest <= self.tolerance
        )


def _largest(steps: Sequence[int], a: Sequence[float], b: Sequence[float]) -> Difference:
    apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
    # Not max(): a NaN would hide behind any number that comes before it.
    bad = [i for i, d in enumerate(apart) if d != d]
    at = bad[0] if bad else max(range(len(apart)), key=apart.__getitem__)
    return Difference(apart[at], steps[at])


def compare(a: History, b: History) -> Agreement:
    """The largest differences between the losses of two networks that saw the same batches."""
    steps = range(1, len(a.losses) + 1)
    verified = min(VERIFIED_STEPS, len(steps))
    looks = sum(step <= verified for step in a.looks)
    return Agreement(
        training_loss=_largest(steps, a.losses, b.losses),
        test_loss=_largest(a.looks, a.test_losses, b.test_losses),
        verified_training_loss=_largest(steps[:verified], a.losses[:verified], b.losses[:verified]),
        verified_test_loss=_largest(a.looks[:looks], a.test_losses[:looks], b.test_losses[:looks]),
        verified_steps=verified,
    )
