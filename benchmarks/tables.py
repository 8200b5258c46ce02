"""What is left of a run: a CSV with every figure, a Markdown table to read, a list of the slow."""

from __future__ import annotations

import csv
import io
import math
import os
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .contenders import COMPILE, COPY, TORCH
from .passes import QUIET, load
from .rows import Row

LARGE_MB = 30.0  # above it no usual cache helps: there the share of the floor means something
MEDIUM_MB = 10.0
SLOW = 0.9

_REGIME_TITLES = {
    "user": "As a user gets it",
    "preallocated": "Outputs preallocated (freed memory is reused, no page faults)",
}

CASE_COLUMNS = ("suite", "shape", "layout", "dtype", "phase", "fused", "layers", "megabytes")
FIGURE_COLUMNS = tuple(
    name for name in Row.__dataclass_fields__ if name not in ("regime", "case", "contender")
)


def write_atomically(path: Path, text: str) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp's 0600 is for secrets
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def to_csv(rows: Iterable[Row], facts: Mapping[str, str]) -> str:
    """Every figure of every row, with the machine's facts repeated so that files can be joined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("regime", *CASE_COLUMNS, "contender", *FIGURE_COLUMNS, *facts))
    for row in rows:
        case = row.case
        writer.writerow(
            (
                row.regime,
                case.suite,
                "x".join(map(str, case.shape)),
                *(getattr(case, name) for name in CASE_COLUMNS[2:-1]),
                _figure(case.megabytes),
                row.contender,
                *(_figure(getattr(row, name)) for name in FIGURE_COLUMNS),
                *facts.values(),
            )
        )
    return text.getvalue()


def _figure(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


class Pair(NamedTuple):
    """One case in one regime: the contender of interest beside the others."""

    ours: Row
    torch: Row
    compiled: Row | None


def pairs(rows: Iterable[Row], ours: str) -> list[Pair]:
    """Cases in which both `ours` and torch.nn have figures."""
    by_case: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if not row.error:
            by_case.setdefault((row.regime, row.case.name), {})[row.contender] = row
    return [
        Pair(found[ours], found[TORCH], found.get(COMPILE))
        for found in by_case.values()
        if ours in found and TORCH in found
    ]


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values) if values else math.nan


def worst_offenders(rows: Iterable[Row], ours: str, limit: float = SLOW) -> list[Row]:
    """Rows of `ours` slower than `limit` of torch.nn, the worst first."""
    slow = [pair.ours for pair in pairs(rows, ours) if pair.ours.speedup < limit]
    return sorted(slow, key=lambda row: row.speedup)


def to_markdown(rows: Sequence[Row], facts: Mapping[str, str], ours: str) -> str:
    """The table: one line for each group of cases, a table for each regime."""
    parts = [f"# Batch norm: {ours} against torch.nn", _facts_line(facts), _LEGEND]
    for regime in dict.fromkeys(row.regime for row in rows):
        here = [row for row in rows if row.regime == regime]
        parts += [f"## {_REGIME_TITLES.get(regime, regime)}"]
        parts += [
            _memory_line(here),
            _noise_line(here, ours),
            _table(pairs(here, ours)),
            _failures(here),
        ]
    slow = worst_offenders(rows, ours)
    parts += [f"## Slower than {SLOW} of torch.nn", _offenders_list(slow)]
    return "\n\n".join(part for part in parts if part) + "\n"


_LEGEND = (
    "× torch.nn: torch.nn eager's time over ours, geometric mean over the group's cases; above 1 "
    f"is faster. Beside it the same over tensors of {MEDIUM_MB:g} MB and more, over all layers of "
    "the network (sums of times, each weighted by how many layers have the shape), and the worst "
    "case. × compile: the same against torch.compile, where it took part. "
    f"Share of floor: median (least) over tensors above {LARGE_MB:g} MB, torch.nn's beside it. "
    "See docs/benchmarks.md."
)

_HEADER = (
    "cases",
    "n",
    "× torch.nn",
    f"≥ {MEDIUM_MB:g} MB",
    "all layers",
    "worst case",
    "× compile",
    "share of floor",
    "torch.nn's",
)


def _facts_line(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in facts.items())


def _noise_line(rows: Sequence[Row], ours: str) -> str:
    """How far the figures can be trusted: the spread of ratios, and who else was at work."""
    both = pairs(rows, ours)
    found = [pair.ours for pair in both]
    if not found:
        return ""
    spread = statistics.median((row.speedup_q3 - row.speedup_q1) / row.speedup for row in found)
    disturbed = sum(load([pair.ours, pair.torch]) > QUIET for pair in both)
    return (
        f"Half of a case's rounds lie within {spread:.0%} of × torch.nn (median over the cases). "
        f"During {disturbed} of {len(found)} cases other programs used more than {QUIET:g} "
        "cores, or calls met page faults that the regime excludes"
        f"{'; those figures are not to be trusted.' if disturbed else '.'}"
    )


def _memory_line(rows: Sequence[Row]) -> str:
    """The copy's bandwidth, and whether the regime did what its name says."""
    large = [row for row in rows if row.case.megabytes > LARGE_MB and not row.error]
    copies = [row.copy_gb_s for row in large if row.contender == COPY]
    faults = [row.page_faults for row in large if row.contender == TORCH]
    if not copies or not faults:
        return ""
    bandwidth, taken = statistics.median(copies), statistics.median(faults)
    return (
        f"Above {LARGE_MB:g} MB a copy moves {bandwidth:.1f} GB/s (read and written) and a call of "
        f"torch.nn takes {taken:,.0f} page faults (medians)."
    )


def _group(pair: Pair) -> str:
    case = pair.ours.case
    fused = "" if case.fused == "none" else f" + {case.fused.replace('+', ' + ')}"
    return f"{case.suite}, {case.layout}, {case.dtype}, {case.phase}{fused}"


def _table(found: Sequence[Pair]) -> str:
    groups: dict[str, list[Pair]] = {}
    for pair in found:
        groups.setdefault(_group(pair), []).append(pair)
    if not groups:
        return "No case with figures for both."
    lines = [_line(_HEADER), _line(["---", *["---:"] * (len(_HEADER) - 1)])]
    lines += [_line((name, *_summary(members))) for name, members in groups.items()]
    return "\n".join(lines)


def _summary(members: Sequence[Pair]) -> list[str]:
    worst = min(members, key=lambda pair: pair.ours.speedup).ours
    medium = [pair.ours.speedup for pair in members if pair.ours.case.megabytes >= MEDIUM_MB]
    large = [pair for pair in members if pair.ours.case.megabytes > LARGE_MB]
    compiled = [
        pair.compiled.median_us / pair.ours.median_us
        for pair in members
        if pair.compiled is not None
    ]
    return [
        str(len(members)),
        _times(geometric_mean([pair.ours.speedup for pair in members])),
        _times(geometric_mean(medium)),
        _times(_all_layers(members)),
        f"{_times(worst.speedup)} at {'×'.join(map(str, worst.case.shape))}",
        _times(geometric_mean(compiled)),
        _share([pair.ours.share_of_floor for pair in large]),
        _share([pair.torch.share_of_floor for pair in large]),
    ]


def _all_layers(members: Sequence[Pair]) -> float:
    """Ratio of the time that all layers with these shapes take; only a network has such a sum."""
    if any(pair.ours.case.suite != "resnet50" for pair in members):
        return math.nan

    def total(rows: Iterable[Row]) -> float:
        return sum(row.case.layers * row.median_us for row in rows)

    return total(pair.torch for pair in members) / total(pair.ours for pair in members)


def _times(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{ratio:.2f}"


def _share(shares: Sequence[float]) -> str:
    return f"{statistics.median(shares):.0%} ({min(shares):.0%})" if shares else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _failures(rows: Sequence[Row]) -> str:
    """Each different reason once, with the number of cases."""
    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.error:
            key = (row.contender, row.error.replace("|", "\\|"))
            reasons[key] = reasons.get(key, 0) + 1
    return "\n".join(
        f"- {contender} has no figures in {count} cases: {reason}"
        for (contender, reason), count in reasons.items()
    )


def _offenders_list(slow: Sequence[Row]) -> str:
    return "\n".join(f"- {offender_line(row)}" for row in slow) or "None."


def offender_line(row: Row) -> str:
    """Name, ratio and its quartiles: where they reach past the limit it may be noise."""
    return (
        f"{row.case.name} ({row.regime}): {row.speedup:.2f} of torch.nn's speed "
        f"({row.speedup_q1:.2f} to {row.speedup_q3:.2f}), {row.median_us:,.1f} µs"
        f"{', disturbed by other programs' if load([row]) > QUIET else ''}"
    )
