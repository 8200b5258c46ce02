"""What :func:`normwise.fold` did, norm by norm, and what it brought."""

from __future__ import annotations

from typing import Any, ClassVar

from normwise.graph.reasons import REASONS
from normwise.pages import Axis, Chart
from normwise.results import Report, label

__all__ = ["FoldReport"]


class FoldReport(Report):
    """Where each batch norm went, or why it stayed.

    ``entries``: ``name`` (the norm's qualified name; a norm that is written as a function call is
    named after the module whose forward calls it), ``action``:

    - ``'folded'``: gone into the weights of ``into`` (convolutions, linear layers, …);
    - ``'merged'``: gone into another norm;
    - ``'multiply-add'``: its statistics are gone, a scale and a shift for each channel are left;
    - ``'left'``: as it was.

    ``reason`` is one of :data:`normwise.graph.REASONS`, with a sentence in ``facts['detail']``.
    ``facts['error']`` is the largest difference of the folded model's outputs there in the
    model's dtype, relative to the largest value, and ``facts['error64']`` in float64.

    ``facts`` of the whole: ``found``, ``parameters``, ``multiply_adds`` and ``latency_ms`` as pairs
    (before, after), ``error`` and ``error64`` of the model's outputs.
    """

    title: ClassVar[str] = "fold"
    columns: ClassVar[tuple[str, ...]] = ("direction", "error", "error64")

    def summary(self) -> list[str]:
        lines = [f"{len(self)} batch norms: {super().summary()[0]}"]
        facts = self.facts
        if facts.get("error") is not None:
            line = f"largest error of the output {facts['error']:.1e} of its largest value"
            if facts.get("error64") is not None:
                line += f", in float64 {facts['error64']:.1e}"
            lines.append(line)
        for name, said, form in (
            ("parameters", "parameters and buffers", "{:,.0f}"),
            ("multiply_adds", "multiply-adds", "{:,.0f}"),
            ("latency_ms", "latency in ms", "{:.2f}"),
        ):
            pair = facts.get(name)
            if pair is not None:
                before, after = (form.format(v) for v in pair)
                lines.append(f"{said}: {before} before, {after} after")
        used = sorted({e.reason for e in self.entries if e.reason is not None})
        lines += [f"{reason}: {REASONS[reason]}" for reason in used]
        return lines

    def charts(self) -> list[Chart]:
        errors = [
            {"layer": e.name, "error": e.facts.get(key), "in": where}
            for e in self.entries
            for key, where in (("error", "the model's dtype"), ("error64", "float64"))
        ]
        return [
            *super().charts(),
            Chart(
                "scatter",
                "Error at each norm",
                "Largest difference of the folded model there, relative to the largest value.",
                errors,
                x=Axis("layer", "layer", "layer"),
                y=Axis("error", "relative error", log=True),
                color=Axis("in", "computed in", "category"),
            ),
            Chart(
                "bar",
                "Cost after the fold",
                "As a share of the cost before it.",
                self._costs(),
                x=Axis("cost", "cost", "category"),
                y=Axis("share", "after / before", format=".1~%"),
                rules=[(1.0, "before the fold")],
            ),
        ]

    def _costs(self) -> list[dict[str, Any]]:
        pairs = {label(k): self.facts.get(k) for k in ("parameters", "multiply_adds", "latency_ms")}
        return [
            {"cost": name, "share": pair[1] / pair[0]}
            for name, pair in pairs.items()
            if pair is not None and pair[0]
        ]
