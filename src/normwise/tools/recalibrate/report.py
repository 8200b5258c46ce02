"""What recalibration found and did: drift of each layer, the check, the metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from normwise.moments import Moments
from normwise.pages import Axis, Chart
from normwise.results import Entry, Report, Result, number
from normwise.tools.norms import drift, largest
from normwise.tools.recalibrate.collect import Pool
from normwise.tools.recalibrate.layers import Layer, Statistics
from normwise.tools.recalibrate.modes import Outcome

__all__ = ["PROMISE", "RecalibrationReport", "RecalibrationResult", "entries"]

PROMISE = 1e-4
"""How near to beta and to gamma^2 sigma^2 / (sigma^2 + eps) mean and variance of a layer's output
come in mode 'exact'; four roundings of buffers or activations where they are coarser (bfloat16)."""


class RecalibrationReport(Report):
    r"""Of each norm how far its statistics were from those of the data, and how far they are now.

    Facts of an entry, each the largest over the channels, with :math:`s^2` the data's unbiased
    variance and :math:`m` their mean, as the layer sees them:

    - ``shift_before``, ``shift_after``: :math:`|\mu - m| / \sqrt{s^2 + \epsilon}`, in standard
      deviations; ``log_var_before``, ``log_var_after``: the :math:`\log((\sigma^2 + \epsilon) /
      (s^2 + \epsilon))` of largest magnitude. ``after`` only in mode 'exact', whose last pass is
      run with the new statistics.
    - ``mean_error``, ``var_error``: the check. :math:`|\mathrm{mean}(y) - \beta|` in units of the
      larger of :math:`|\gamma|, |\beta|`, and :math:`|\mathrm{var}(y) - \gamma^2 \sigma^2 (n-1)/n /
      (\sigma^2 + \epsilon)|` in units of :math:`\gamma^2`; (n-1)/n because ``running_var`` is the
      unbiased variance, as in torch.nn. ``checked`` says whether y was the layer's own output, or
      computed from the moments of its input (where the layer goes on with an activation or a
      residual).
    - ``batches``, ``values``: how many were pooled, the latter for each channel; ``channels``.

    ``facts``: ``mode``, ``blend``, ``passes``, ``batches``, ``ranks``, ``self_consistent`` (True,
    False, or None where it was not checked), ``mean_error`` and ``var_error`` (the largest),
    ``metric_before`` and ``metric_after`` (by name).
    """

    title: ClassVar[str] = "recalibration"
    columns: ClassVar[tuple[str, ...]] = (
        "values",
        "shift_before",
        "shift_after",
        "log_var_before",
        "log_var_after",
        "mean_error",
        "var_error",
    )

    def summary(self) -> list[str]:
        f = self.facts
        passes = "1 pass" if f["passes"] == 1 else f"{f['passes']} passes"
        ranks = f" on {f['ranks']} ranks" if f["ranks"] > 1 else ""
        batches = "1 batch" if f["batches"] == 1 else f"{f['batches']} batches"
        lines = [f"{super().summary()[0]} (mode {f['mode']!r}, {passes} over {batches}{ranks})"]
        if f["self_consistent"] is not None:
            mean, var = number(f["mean_error"]), number(f["var_error"])
            verdict = "holds" if f["self_consistent"] else "DOES NOT HOLD"
            lines.append(
                f"check {verdict}: on these data every output has mean beta to "
                f"{mean:.1e} and variance gamma^2 sigma^2 / (sigma^2 + eps) to {var:.1e} "
                f"(promised: {PROMISE:.0e}; in half precision 4 roundings)"
            )
        for name, before in f["metric_before"].items():
            after = f["metric_after"].get(name)
            lines.append(f"{name}: {number(before):.6g} -> {number(after):.6g}")
        return lines

    def verdict(self) -> tuple[Literal["good", "bad"], str] | None:
        holds = self.facts["self_consistent"]
        if holds is None:
            return None
        if holds:
            return "good", "on these data the outputs have the mean and variance that they should"
        return "bad", "on these data the outputs do not have the mean and variance that they should"

    def charts(self) -> list[Chart]:
        layer = Axis("layer", "layer", "layer")
        drift = [
            {
                "layer": e.name,
                "at": at,
                **{k: e.facts.get(f"{k}_{at}") for k in ("shift", "log_var")},
            }
            for e in self.entries
            for at in ("before", "after")
        ]
        check = [
            {"layer": e.name, "error": e.facts.get(f"{k}_error"), "of": of}
            for e in self.entries
            for k, of in (("mean", "mean"), ("var", "variance"))
        ]
        when = Axis("at", "recalibration", "category", values=("before", "after"))
        return [
            Chart(
                "scatter",
                "Shift of the mean",
                "From the mean that the layer remembered to that of the data, in standard "
                "deviations; the largest of its channels.",
                drift,
                x=layer,
                y=Axis("shift", "shift in standard deviations"),
                color=when,
                joined=True,
            ),
            Chart(
                "scatter",
                "Change of the variance",
                "Logarithm of the remembered variance over that of the data; the largest of the "
                "channels. 0 is equal, 0.69 twice, -0.69 half.",
                drift,
                x=layer,
                y=Axis("log_var", "log of the ratio of variances"),
                color=when,
                joined=True,
                rules=[(0.0, "equal")],
            ),
            Chart(
                "scatter",
                "Check of the outputs",
                f"How far mean and variance of each output are off; {PROMISE:.0e} is promised.",
                check,
                x=layer,
                y=Axis("error", "relative error", log=True),
                color=Axis("of", "of the", "category", values=("mean", "variance")),
                rules=[(PROMISE, "promised")],
            ),
        ]


@dataclass(frozen=True)
class RecalibrationResult(Result[nn.Module, RecalibrationReport]):
    """``result.model``, ``result.report``; :meth:`undo` puts the old statistics back."""

    _undo: Callable[[], None]

    def undo(self) -> nn.Module:
        """The statistics that the layers had before, in ``result.model``, which is returned."""
        self._undo()
        return self.model


def _drift(s: Statistics, seen: Moments, eps: float) -> tuple[float, float]:
    mean, var = seen.mean.to(s.mean), seen.variance(1).to(s.var)
    shift, log_var = drift(s.mean, s.var, mean, var, eps)
    return float(largest(shift)), float(largest(log_var))


def _check(layer: Layer, s: Statistics, pool: Pool) -> dict[str, Any]:
    """Mean and variance of the output against beta and gamma^2 sigma^2 / (sigma^2 + eps)."""
    assert pool.seen is not None
    seen, module = pool.seen, layer.module
    gamma, beta = (
        torch.full_like(s.mean, other) if p is None else p.detach().to(s.mean)
        for p, other in ((module.weight, 1.0), (module.bias, 0.0))
    )
    scale = gamma * (s.var + module.eps).rsqrt()
    n = int(seen.count)
    if pool.given is not None:
        mean, var = pool.given.mean.to(s.mean), pool.given.variance().to(s.mean)
    else:
        mean = scale * (seen.mean.to(s.mean) - s.mean) + beta
        var = scale * scale * seen.variance().to(s.mean)
    mean_error = (mean - beta).abs() / _unit(torch.maximum(gamma.abs(), beta.abs()))
    var_error = (var - scale * scale * s.var * ((n - 1) / n)).abs() / _unit(gamma * gamma)
    return {
        "mean_error": float(largest(mean_error)),
        "var_error": float(largest(var_error)),
        "checked": "input" if pool.given is None else "output",
    }


def _unit(t: Tensor) -> Tensor:
    return torch.where(t > 0, t, torch.ones_like(t))


def entries(
    layers: Mapping[str, Layer], outcome: Outcome, blend: float
) -> tuple[list[Entry], bool | None]:
    """An entry for each layer, in the order of their calls, and whether the check holds (None
    where there is none)."""
    order = [*outcome.last.order, *(n for n in layers if n not in outcome.last.order)]
    found, holds = [], None
    for name in order:
        layer, pool = layers[name], outcome.last.pools[name]
        new = outcome.statistics.get(name)
        if new is None or pool.seen is None:
            found.append(
                Entry(name, "left", reason="no-values" if pool.batches else "never-called")
            )
            continue
        eps = layer.module.eps
        facts: dict[str, Any] = {
            "batches": pool.batches,
            "values": pool.values,
            "channels": int(new.mean.numel()),
        }
        facts["shift_before"], facts["log_var_before"] = _drift(layer.source, pool.seen, eps)
        if outcome.verified:
            facts["shift_after"], facts["log_var_after"] = _drift(new, pool.seen, eps)
        if outcome.verified and blend == 1:
            facts.update(_check(layer, new, pool))
            buffer = layer.module.running_var
            assert buffer is not None
            allowed = max(PROMISE, 4 * torch.finfo(buffer.dtype).eps, 4 * pool.rounding)
            good = max(facts["mean_error"], facts["var_error"]) <= allowed  # False for NaN too
            holds = good and holds is not False
        found.append(Entry(name, "recalibrated" if blend == 1 else "blended", facts=facts))
    return found, holds
