"""The run of the demo in words, for a terminal: a table, the verdict, and figure 1 as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .network import NORMWISE, PLAIN, TORCH
from .result import DemoResult, NetworkResult

if TYPE_CHECKING:
    from .aftercare import Aftercare

__all__ = ["print_summary", "sparkline"]

BLOCKS = "▁▂▃▄▅▆▇█"
DIGITS = "0123456789"
WIDTH = 48


def sparkline(shares: Sequence[float], levels: str, width: int = WIDTH) -> str:
    """``shares`` of 1 as one character each, stretched or thinned to ``width`` of them."""
    picked = [shares[i * len(shares) // width] for i in range(width)]
    return "".join(levels[min(int(share * len(levels)), len(levels) - 1)] for share in picked)


def _milestones(looks: Sequence[int]) -> list[int]:
    """Indices of the looks at or after 10, 30, 100, 300, ... steps, and of the last one."""
    goals = [lead * 10**power for power in range(1, 9) for lead in (1, 3)]
    at = [next((i for i, step in enumerate(looks) if step >= goal), None) for goal in goals]
    return sorted({i for i in at if i is not None} | {len(looks) - 1})


def _steps(steps: int | None) -> str:
    return "- not reached" if steps is None else f"{steps:,}"


def _comparison(result: DemoResult) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("batch norm")
    for name in ("steps to 90 %", "to 95 %", "accuracy", "step time", "drift"):
        table.add_column(name, justify="right")
    for name, network in result.networks.items():
        table.add_row(
            name,
            _steps(network.steps_to_90),
            _steps(network.steps_to_95),
            f"{network.final_accuracy:.1%}",
            f"{network.step_ms:.2f} ms",
            f"{network.drift:.2f}",
        )
    return table


def _percentiles(result: DemoResult) -> Table:
    plain, ours = result.networks[PLAIN], result.networks[NORMWISE]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("step", justify="right")
    table.add_column("no batch norm", justify="center")
    table.add_column("batch norm", justify="center")

    def cell(network: NetworkResult, look: int) -> str:
        return " ".join(f"{network.sigmoid_inputs[q][look]:6.2f}" for q in (15, 50, 85))

    for look in _milestones(plain.looks):
        table.add_row(f"{plain.looks[look]:,}", cell(plain, look), cell(ours, look))
    return table


def _verdict(result: DemoResult) -> Text:
    found = result.agreement
    text = Text("The two batch norms ")
    if found.passed:
        text.append("agree", style="bold green")
    else:
        text.append("DISAGREE", style="bold red")
    text.append(
        f": in the first {found.verified_steps:,} steps their training losses are at most "
        f"{found.verified_training_loss.largest:.1e} apart, their test losses "
        f"{found.verified_test_loss.largest:.1e}; {found.tolerance:.0e} is allowed."
    )
    if result.settings.steps > found.verified_steps:
        text.append(
            f" In all {result.settings.steps:,} steps: {found.training_loss.largest:.1e} "
            f"(step {found.training_loss.step:,}) and {found.test_loss.largest:.1e} "
            f"(step {found.test_loss.step:,}), where training may magnify rounding."
        )
    return text


def _aftercare(care: Aftercare) -> list[str]:
    """A line for each tool."""
    accuracies = care.accuracies
    return [
        f"check: {care.check.summary()[0]}",
        f"recalibrate: {care.recalibration.summary()[0]}; accuracy {accuracies['trained']:.1%}, "
        f"then {accuracies['recalibrated']:.1%}",
        f"fold: {care.fold.summary()[0]}; accuracy {accuracies['folded']:.1%}",
    ]


def print_summary(result: DemoResult, console: Console) -> None:
    """Prints the run, in ASCII where the console's encoding asks for it."""
    settings = result.settings
    ascii_only = console.options.ascii_only
    levels = DIGITS if ascii_only else BLOCKS

    def say(text: str | Text = "", style: str = "") -> None:
        console.print(text, style=style, highlight=False, markup=False)

    say(f"{settings.steps:,} steps in {result.seconds:.0f} s, seed {result.seed}", "bold")
    console.print(_comparison(result))
    say(
        f"accuracy: on {settings.test_images} test images at the end. step time: median; a step "
        f"with {NORMWISE} takes {result.step_time_ratio:.2f} times as long as one with {TORCH}. "
        "drift: how far a sigmoid's median input moved in training, median of "
        f"{settings.hidden_units} sigmoids."
    )
    say()
    say(_verdict(result))
    say()
    say(f"Test accuracy, 0 to 100 %, from step 0 to {settings.steps:,}", "bold")
    for label, name in (("batch norm", NORMWISE), ("none", PLAIN)):
        say(f"  {label:>10}  {sparkline(result.networks[name].accuracies, levels)}")
    say()
    say(
        f"15th, 50th and 85th percentile of the input of sigmoid {result.typical_unit}, "
        "last hidden layer",
        "bold",
    )
    console.print(_percentiles(result))
    if result.aftercare is not None:
        say("The network with normwise's batch norm, afterwards", "bold")
        for line in _aftercare(result.aftercare):
            say(f"  {line}")
    for name, file in (("Picture:", result.picture), ("Page:", result.page)):
        if file is not None:
            path = str(file)
            console.print(
                name,
                path.encode("ascii", "backslashreplace").decode() if ascii_only else path,
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
