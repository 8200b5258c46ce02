from __future__ import annotations

from collections.abc import Iterator

import torch

from normwise.doctor.finding import Finding, Repair
from normwise.doctor.rule import Rule
from normwise.doctor.subject import NormState, Subject

__all__ = ["BiasedVariance"]

# Float32 holds a ratio to 1.2e-7; a ratio that stands out of that ten times is one: n up to 1e6.
_ROUNDING = 1.2e-7
# From n = 51 on the outputs differ by under 1 %.
_SHOWS = 0.02


class BiasedVariance(Rule):
    """## What it finds
    With ``peers=``: a checkpoint of the same weights and running means whose running variances are
    those here times n / (n - 1), one n for all channels of a layer: one of the two averages biased
    batch variances. A warning for n up to 51, where outputs differ by 1 % and more; info beyond.

    ## Why it is bad
    torch.nn normalizes by the biased variance of a batch but keeps the unbiased one. Flax, Haiku,
    Paddle and ONNX keep the biased one, Keras by the kernel. A port that copies numbers is off by
    sqrt(n / (n - 1)), where n is the values a channel in a batch: nothing for convolutions on large
    maps, 1.6 % for a dense layer at batch 32, 5 % for one at batch 10.

    ## Example
    ```python
    bn, port = torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
    for _ in range(100):
        bn(torch.randn(16, 4))
    port.load_state_dict(bn.state_dict())
    port.running_var.mul_(15 / 16)  # as another framework keeps it
    nw.check(port, peers=[bn])
    ```

    ## Remedy
    Multiply the running variance by n / (n - 1) (the unsafe fix, where this is the biased one), or
    recalibrate: ``nw.recalibrate(model, data)``.

    ## Sources
    Ioffe & Szegedy 2015, algorithm 2, step 10 (the unbiased variance for inference);
    ``normwise.interop.conventions``.
    """

    code = "NW118"
    name = "biased-variance"
    severity = "warning"
    confidence = "medium"
    needs = "peers"

    def check(self, subject: Subject) -> Iterator[Finding]:
        for norm in subject.batch_norms():
            for peer, norms in subject.peers.items():
                other = norms.get(norm.name)
                ratio = None if other is None else _ratio(norm, other)
                if ratio is not None and other is not None:
                    yield self._found(norm, other, peer, ratio)
                    break

    def _found(self, norm: NormState, other: NormState, peer: str, ratio: float) -> Finding:
        smaller = ratio > 1  # of the peer over ours
        factor = ratio if smaller else 1 / ratio
        n = factor / (factor - 1)
        assert norm.running_var is not None
        assert norm.var is not None
        low, high = ("here", f"of {peer}") if smaller else (f"of {peer}", "here")
        return self.finding(
            norm.name,
            f"the running variances {low} are {1 / factor:.5g} times those {high} in all channels, "
            f"(n - 1)/n for n = {n:.4g}: a biased variance against an unbiased one",
            "keep the unbiased variance, as torch.nn does",
            severity="warning" if factor - 1 >= _SHOWS * 0.999 else "info",
            repair=Repair(
                False,
                f"multiplies the running variance by n/(n - 1), n = {n:.4g}",
                {"running_var": (norm.var * factor).to(norm.running_var.dtype)},
            )
            if smaller
            else None,
            n=n,
            ratio=factor,
            biased="here" if smaller else peer,
            peer=peer,
        )


def _ratio(norm: NormState, other: NormState) -> float | None:
    """The variance of ``other`` over that of ``norm``, if it is one number n / (n - 1) or its
    inverse and all else is equal."""
    for name in ("weight", "bias", "running_mean"):
        a, b = getattr(norm, name), getattr(other, name)
        if (a is None) != (b is None):
            return None
        if a is not None and (
            a.shape != b.shape or not torch.allclose(a.double(), b.double(), 1e-6, 1e-7)
        ):
            return None
    a, b = norm.var, other.var
    # One channel has one ratio, whatever it comes from.
    if a is None or b is None or a.shape != b.shape or a.numel() < 2 or not bool((a > 0).all()):
        return None
    ratios = b / a
    ratio = float(ratios.median())
    factor = max(ratio, 1 / ratio) if ratio > 0 else 0.0
    excess = factor - 1
    spread = float(ratios.max() - ratios.min())
    if not 10 * _ROUNDING < excess <= 1.0 or not spread <= max(4 * _ROUNDING, 0.01 * excess):
        return None
    # n is a whole number, as far as the ratio's digits show it: dn = n² d(ratio).
    n = factor / excess
    return ratio if abs(n - round(n)) <= max(1e-3, n * n * 4 * _ROUNDING) else None
