"""Command line of the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import cases, machine, tables
from .contenders import AGAIN, COMPILE, OURS, TORCH
from .passes import Readings, measure_regimes
from .regimes import REGIMES, ROOT, WorkerFailed
from .rows import Row
from .timing import Plan

_PLANS = {
    cases.QUICK: Plan(budget=0.1, patience=0.5, least_rounds=6),
    cases.DEFAULT: Plan(budget=0.2, patience=1.0),
    cases.FULL: Plan(),
}
_RETRY = {cases.QUICK: 0.0, cases.DEFAULT: 120.0, cases.FULL: 1800.0}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    selection = p.add_mutually_exclusive_group()
    selection.add_argument("--quick", action="store_true", help="a few cases, under a minute")
    selection.add_argument("--full", action="store_true", help="the whole cross product: hours")
    p.add_argument("--suite", choices=("all", *cases.SUITES), default="all")
    p.add_argument("--filter", default="", metavar="TEXT", help="only cases with TEXT in the name")
    p.add_argument("--phase", choices=cases.PHASES)
    p.add_argument("--layout", choices=cases.LAYOUTS)
    p.add_argument("--dtype", choices=cases.DTYPES)
    p.add_argument("--regime", choices=("both", *REGIMES), default="both")
    p.add_argument("--threads", type=int, default=2, metavar="N")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument(
        "--null",
        action="store_true",
        help="time torch.nn against itself instead of normwise: shows what the noise is",
    )
    p.add_argument(
        "--retry",
        type=float,
        metavar="SECONDS",
        help="how long, in all, to measure cases again that other programs disturbed "
        "(default 120; 0 with --quick)",
    )
    p.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, and say which cases are slow.

    Returns 1 if a measuring process failed or the user broke off, 2 for wrong usage.
    """
    options = parser().parse_args(argv)
    console = Console(stderr=True)
    selection = cases.QUICK if options.quick else cases.FULL if options.full else cases.DEFAULT
    chosen = cases.select(
        selection,
        suite=options.suite,
        text=options.filter,
        phase=options.phase,
        layout=options.layout,
        dtype=options.dtype,
    )
    if not chosen or options.threads < 1:
        what = (
            "no case is left" if not chosen else f"--threads must be 1 or more: {options.threads}"
        )
        hint = " (--full has more of them)" if not chosen and not options.full else ""
        console.print(f"python -m benchmarks: {what}{hint}", style="red")
        return 2
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0

    ours = AGAIN if options.null else OURS
    job = _job(chosen, selection, options, ours)
    regimes = REGIMES if options.regime == "both" else (options.regime,)
    retry = options.retry if options.retry is not None else _RETRY[selection]
    facts = machine.describe(options.threads)
    readings, failure = _measure(job, regimes, retry, console)
    if rows := readings.rows:
        facts["torch"] = readings.torch_version
        # What is left of a run that broke off must not replace the results of one that did not.
        name = f"batch_norm{'_null' if options.null else ''}{'_partial' if failure else ''}"
        stem = options.out / name
        markdown = tables.to_markdown(rows, facts, ours)
        tables.write_atomically(stem.with_suffix(".csv"), tables.to_csv(rows, facts))
        tables.write_atomically(stem.with_suffix(".md"), markdown)
        print(markdown)
        console.print(f"written: {stem}.csv, {stem}.md", soft_wrap=True)
    if failure:
        console.print(failure, style="red", markup=False)
    return 1 if failure else 0


def _job(
    chosen: Sequence[cases.Case], selection: str, options: argparse.Namespace, ours: str
) -> dict[str, Any]:
    """What the worker is told.  torch.nn comes first: the others are compared with its results."""

    def contenders(case: cases.Case) -> list[str]:
        with_compile = not options.no_compile and cases.compiled(case, selection)
        return [TORCH, *([COMPILE] if with_compile else []), ours]

    return {
        "threads": options.threads,
        "plan": dataclasses.asdict(_PLANS[selection]),
        "cases": [{"case": case.to_dict(), "contenders": contenders(case)} for case in chosen],
    }


def _measure(
    job: dict[str, Any], regimes: Sequence[str], retry: float, console: Console
) -> tuple[Readings, str]:
    """Run the job under a progress bar; what was measured before a failure is kept."""
    readings = Readings()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    # Drawing is work for the cores that are being timed: once a second is enough.
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task("starting", total=len(regimes) * len(job["cases"]))

        def report(row: Row, again: bool) -> None:
            what = "disturbed, once more: " if again else ""
            description = f"{what}{row.regime} {row.case.name}"
            progress.update(task, advance=0 if again else 1, description=description)

        try:
            measure_regimes(job, regimes, retry, readings, report)
        except WorkerFailed as error:
            return readings, str(error)
        except KeyboardInterrupt:
            return readings, "interrupted"
    return readings, ""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the worker with us
    sys.exit(main())
