"""The demo's page, from what its ``to_dict()`` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from normwise.pages import Axis, Chart, Column, Page, Section, Table

__all__ = ["DemoView"]

STEP = Axis("step", "training step", format="~d")


@dataclass(frozen=True)
class DemoView:
    """data: a :meth:`normwise.demo.DemoResult.to_dict`, as it is or as JSON gave it back."""

    data: Mapping[str, Any]

    def _curves(self, key: str) -> list[dict[str, Any]]:
        """A row for each look of each network."""
        return [
            {"step": step, "value": value, "network": name}
            for name, network in self.data["networks"].items()
            for step, value in zip(network["looks"], network[key], strict=True)
        ]

    def _inputs(self) -> list[dict[str, Any]]:
        """Of the typical sigmoid, as in the demo's picture: without the start, where nothing is
        learned yet, and without torch.nn's, which would lie under normwise's."""
        rows = []
        for name, network in self.data["networks"].items():
            if name == "torch.nn":
                continue
            curves = {int(q): curve for q, curve in network["sigmoid_inputs"].items()}
            for i, step in enumerate(network["looks"][1:], 1):
                low, middle, high = (curves[q][i] for q in (15, 50, 85))
                row = {"step": step, "network": name, "median": middle}
                rows.append({**row, "15th percentile": low, "85th percentile": high})
        return rows

    def _charts(self) -> list[Chart]:
        value = Axis("value", "accuracy", format=".1~%")
        network = Axis("network", "batch norm", "category", values=tuple(self.data["networks"]))
        return [
            Chart(
                "line",
                "Test accuracy",
                "Share of the test images that each network classifies right.",
                self._curves("accuracies"),
                x=STEP,
                y=value,
                color=network,
            ),
            Chart(
                "line",
                "Test loss",
                "Cross-entropy of each network on the test images, in nats.",
                self._curves("test_losses"),
                x=STEP,
                y=Axis("value", "loss", log=True),
                color=network,
            ),
            Chart(
                "line",
                "Input of a sigmoid",
                f"Median of the input of sigmoid {self.data['typical_unit']} of the last hidden "
                "layer over the test images, in the band from its 15th to its 85th percentile.",
                self._inputs(),
                x=STEP,
                y=Axis("median", "median"),
                color=network,
                band=("15th percentile", "85th percentile"),
            ),
        ]

    def _table(self) -> Table:
        columns = [Column("network", "batch norm")]
        numbers = ("steps_to_90", "steps_to_95", "final_accuracy", "step_ms", "drift")
        names = ("steps to 90 %", "steps to 95 %", "accuracy", "ms a step", "drift")
        columns += [Column(k, name, "number") for k, name in zip(numbers, names, strict=True)]
        networks = self.data["networks"].items()
        rows = [{"network": name, **{k: one[k] for k in numbers}} for name, one in networks]
        return Table("Network by network", columns, rows)

    def sections(self) -> list[Section]:
        """One: verdict, curves, table."""
        agreement, settings = self.data["agreement"], self.data["settings"]
        agree = bool(agreement["passed"])
        apart = [agreement[f"verified_{kind}_loss"]["largest"] for kind in ("training", "test")]
        told = ["a value that is not finite" if a is None else f"{a:.1e}" for a in apart]
        return [
            Section(
                title="demo",
                verdict=(
                    "good" if agree else "bad",
                    f"the two batch norms {'agree' if agree else 'DISAGREE'}: in the first "
                    f"{agreement['verified_steps']} steps their training losses are {told[0]} "
                    f"apart, their test losses {told[1]}; {agreement['tolerance']:.0e} is allowed",
                ),
                summary=[
                    f"{settings['steps']:,} steps in {self.data['seconds']:.0f} s, "
                    f"seed {self.data['seed']}: a network on handwritten digits, without batch "
                    "norm, with torch.nn's and with normwise's"
                ],
                charts=self._charts(),
                tables=[self._table()],
            )
        ]

    def page(self) -> Page:
        """The demo as a page of its own."""
        return Page("normwise demo", self.sections())
