"""One measured figure: a case, a contender, a regime, and what was read."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from .cases import Case
from .floor import copy_bandwidth, floor_seconds, units
from .timing import Samples, paired_ratio, quartiles

NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Row:
    """Times in microseconds of one call.

    `speedup` is torch.nn's time over this contender's, `share_of_floor` the floor over its time,
    each the median over the rounds of a ratio formed within the round.  `page_faults` are those of
    a call; `other_load` is how many cores other programs kept busy meanwhile.  `error` is empty,
    or says why there are no figures (they are NaN then).
    """

    regime: str
    case: Case
    contender: str
    error: str = ""
    median_us: float = NAN
    q1_us: float = NAN
    q3_us: float = NAN
    rounds: int = 0
    inner: int = 0
    speedup: float = NAN
    speedup_q1: float = NAN
    speedup_q3: float = NAN
    floor_units: int = 0
    floor_us: float = NAN
    share_of_floor: float = NAN
    copy_gb_s: float = NAN
    page_faults: float = NAN
    other_load: float = NAN

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "case": self.case.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Row:
        return cls(**{**fields, "case": Case.from_dict(fields["case"])})


def make_row(
    regime: str,
    case: Case,
    contender: str,
    own: Samples,
    copy: Samples,
    baseline: Samples | None,
    other_load: float = NAN,
) -> Row:
    """Reduce the samples of one contender, beside those of the copy and of torch.nn."""
    time = quartiles(own.seconds)
    copied = quartiles(copy.seconds).median
    floors = [floor_seconds(case, seconds) for seconds in copy.seconds]
    row = Row(
        regime=regime,
        case=case,
        contender=contender,
        median_us=time.median * 1e6,
        q1_us=time.q1 * 1e6,
        q3_us=time.q3 * 1e6,
        rounds=len(own.seconds),
        inner=own.inner,
        floor_units=units(case),
        floor_us=floor_seconds(case, copied) * 1e6,
        share_of_floor=NAN if own is copy else paired_ratio(floors, own.seconds).median,
        copy_gb_s=copy_bandwidth(case, copied) / 1e9,
        page_faults=statistics.fmean(own.page_faults),
        other_load=other_load,
    )
    if baseline is None or own is copy:
        return row
    ratio = paired_ratio(baseline.seconds, own.seconds)
    return dataclasses.replace(row, speedup=ratio.median, speedup_q1=ratio.q1, speedup_q3=ratio.q3)
