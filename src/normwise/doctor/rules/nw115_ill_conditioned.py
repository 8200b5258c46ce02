from __future__ import annotations

from collections.abc import Iterator

import torch

from normwise.doctor.figures import dead, eps_of, first
from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule
from normwise.doctor.subject import NormState, Subject

__all__ = ["IllConditioned"]


class IllConditioned(Rule):
    """## What it finds
    Channels whose mean is so large beside their deviation that the dtype of the activations cannot
    hold the difference. The error of a normalized output, about eps·|mean| / σ with the dtype's
    eps, is over 1e-4, or over ten times that eps where it is coarser (|mean| / σ over 840 for
    float32, mean² / variance over 7e5; over 10 for float16 and bfloat16). Severity error from 0.5.

    ## Why it is bad
    The input itself is rounded, by up to half of eps·|mean|, before the layer sees it; nothing in
    the layer brings that back. Kernels add to it: with mean 1e6 and variance 1 in float32 torch.nn
    2.13 adds up to 0.037 to an output in contiguous and 5.8 in channels_last layout, normwise
    3.3e-7. Constant channels are rule NW105's.

    ## Example
    ```python
    bn = torch.nn.BatchNorm1d(2)
    for _ in range(200):
        bn(torch.randn(64, 2) + torch.tensor([0.0, 1e5]))  # a timestamp as a feature
    nw.check(bn)  # channel 1: outputs are off by 0.012
    ```

    ## Remedy
    Take the constant out before: standardise inputs in float64, drop a bias that grew, or train a
    norm earlier. In half precision, keep this layer's input in float32.

    ## Sources
    Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance": the condition number
    of a variance is sqrt(1 + mean² / σ²). The measured figures: README, "What you get".
    """

    code = "NW115"
    name = "ill-conditioned"
    severity = "warning"

    def check(self, subject: Subject) -> Iterator[Finding]:
        for norm in subject.batch_norms():
            assert norm.mean is not None
            assert norm.var is not None
            dtype = _activations(subject, norm)
            eps = torch.finfo(dtype).eps
            error = eps * norm.mean.abs() / (norm.var.clamp(min=0) + eps_of(norm)).sqrt()
            bad = (error > max(1e-4, 10 * eps)) & ~dead(norm) & error.isfinite()
            count = int(bad.sum())
            if not count:
                continue
            worst = float(error[bad].max())
            yield self.finding(
                norm.name,
                f"|mean|/σ is up to {worst / eps:.3g} in {count} of {bad.numel()} channels: in "
                f"{str(dtype).removeprefix('torch.')} a normalized output is off by {worst:.2g}",
                "take the constant out of the input before the layer",
                severity="error" if worst >= 0.5 else "warning",
                channels=count,
                of=bad.numel(),
                ratio=worst / eps,
                error=worst,
                dtype=str(dtype).removeprefix("torch."),
                which=first(bad),
            )


def _activations(subject: Subject, norm: NormState) -> torch.dtype:
    """The coarsest dtype that data showed; without data that of the parameters, else float32."""
    seen = subject.dynamics.evaluated.get(norm.name) if subject.dynamics else None
    if seen is not None and seen.dtypes:
        return max(seen.dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    tensors = (norm.weight, norm.bias, norm.running_mean)
    held = next((t.dtype for t in tensors if t is not None and t.is_floating_point()), None)
    return held or torch.float32
