from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from normwise.doctor.figures import DEFAULT_MOMENTUM, eps_of
from normwise.doctor.finding import Finding, Repair
from normwise.doctor.rule import Rule
from normwise.doctor.subject import NormState, Subject

__all__ = ["HalfPrecisionBuffers"]

_HALF = (torch.float16, torch.bfloat16)
# Variances grow by an order of magnitude within a training: closer to the largest than that is
# close.
_ROOM = 16.0
# A mean that is rounded by a twentieth of a standard deviation shifts the output by as much.
_SHIFT = 0.05


class HalfPrecisionBuffers(Rule):
    """## What it finds
    Running statistics in float16 or bfloat16: how close they are to overflow, how far the rounding
    shifts the output, and how large an update must be not to be lost. Info for a norm that only
    serves in eval mode; a warning in training mode, near overflow, or where rounding shows.

    ## Why it is bad
    float16 ends at 65504: a variance beyond that is inf, and the channel gives β for ever (rule
    NW101). Below 6e-8 it is 0. An exponential average adds m·(batch - running); where that is under
    half a unit in the last place, it is rounded away, and the average *stalls*: with m = 0.1,
    bfloat16 (8 bits) ignores batches whose variance differs by less than 2 to 4 %, float16 (11
    bits) by 0.2 to 0.5 %. With m = 0.01 ten times that. The mean stalls in the same way, and where
    |mean| ≫ σ by whole standard deviations.

    ## Example
    ```python
    bn = torch.nn.BatchNorm2d(8).to(torch.bfloat16)
    nw.check(bn)  # stalls: updates under 2 % of the variance are lost
    ```

    ## Remedy
    Keep norms in float32: autocast does, ``model.half()`` does not. torch.nn and normwise take
    half-precision input with float32 parameters and buffers; the unsafe fix makes them so.

    ## Sources
    Micikevicius et al. 2018, "Mixed Precision Training", section 3.3 (norms in float32);
    IEEE 754, round to nearest even.
    """

    code = "NW114"
    name = "half-precision-buffers"
    severity = "warning"

    def check(self, subject: Subject) -> Iterator[Finding]:
        for norm in subject.batch_norms():
            assert norm.running_var is not None
            assert norm.running_mean is not None
            assert norm.mean is not None
            assert norm.var is not None
            dtype = norm.running_var.dtype
            if dtype not in _HALF:
                continue
            info = torch.finfo(dtype)
            sigma = (norm.var.clamp(min=0) + eps_of(norm)).sqrt()
            m = DEFAULT_MOMENTUM if norm.momentum is None else norm.momentum
            largest = float(norm.var.max()) if norm.var.numel() else 0.0
            shift = _worst(_ulp(norm.running_mean) / 2 / sigma)
            stall_var = _worst(_ulp(norm.running_var) / 2 / norm.var.abs()) / m if m else None
            stall_mean = shift / m if m else None
            near = largest > info.max / _ROOM
            training = norm.module is not None and norm.module.training and bool(m)
            serious = near or shift > _SHIFT or training
            name = str(dtype).removeprefix("torch.")
            lost = "" if stall_var is None or stall_mean is None else (
                f"; with momentum {m:g} updates are lost below {stall_var:.2%} of a variance and "
                f"{stall_mean:.2g} standard deviations of a mean"
            )  # fmt: skip
            yield self.finding(
                norm.name,
                f"running statistics in {name}: the largest variance is {largest:.3g} of "
                f"{info.max:.3g}, rounding shifts outputs by up to {shift:.2g} deviations{lost}",
                "keep the norm in float32",
                severity="warning" if serious else "info",
                repair=Repair(False, "takes the norm's tensors to float32", _wide(norm)),
                dtype=name,
                largest=largest,
                limit=info.max,
                shift=shift,
                stall_variance=stall_var,
                stall_mean=stall_mean,
                training=training,
            )


def _ulp(t: Tensor) -> Tensor:
    """A unit in the last place of each value, float64."""
    info = torch.finfo(t.dtype)
    # The exponent e of |t| = f 2^e with f in [1/2, 1); normal numbers from the smallest one on.
    _, exponent = torch.frexp(t.double().abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full_like(t, info.eps / 2, dtype=torch.float64), exponent)


def _worst(values: Tensor) -> float:
    """The largest finite one."""
    values = values[values.isfinite()]
    return float(values.max()) if values.numel() else 0.0


def _wide(norm: NormState) -> dict[str, Tensor]:
    """All four, since torch.nn wants them in one dtype."""
    names = ("weight", "bias", "running_mean", "running_var")
    return {n: t.float() for n in names if (t := getattr(norm, n)) is not None}
