"""The process that measures one regime: reads a job from stdin, writes a JSON line for each case.

Started by `benchmarks.regimes`, which sets the allocator's environment variables.  Each case runs
in a fork of this process, made before it has threads or has allocated a tensor.  So the state of
the allocator (glibc moves its thresholds with what was freed, and a fragmented heap stays
fragmented), and with it the figures, do not depend on which cases ran before; and a case that
crashes is one row.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Collection, Sequence
from typing import Any, TextIO

import torch

from .cases import Case
from .contenders import COMPILE, COPY, OURS, TORCH, Data, build, disagreement, make_data
from .machine import other_load
from .regimes import PREALLOCATED
from .rows import Row, make_row
from .timing import Call, Plan, measure


def measure_case(regime: str, case: Case, contenders: Sequence[str], plan: Plan) -> list[Row]:
    """Rows of all contenders for one case; one that fails has a row that says why."""
    if regime == PREALLOCATED:
        _fault_in(case)
    data = make_data(case)
    failed: dict[str, str] = {}
    calls: dict[str, Call] = {COPY: build(COPY, case, data)}
    with torch.set_grad_enabled(case.phase != "eval"):
        expected: object = None
        for contender in contenders:
            call, expected, failed[contender] = _prepare(contender, case, data, expected)
            if call is not None:
                calls[contender] = call
        del expected
        with other_load() as meter:
            samples = measure(calls, plan)
    copy, baseline = samples[COPY], samples.get(TORCH)
    return [
        make_row(regime, case, contender, samples[contender], copy, baseline, meter.cores)
        if contender in samples
        else Row(regime, case, contender, error=failed[contender])
        for contender in (COPY, *contenders)
    ]


def _fault_in(case: Case) -> None:
    """Have the kernel map, before any clock runs, all the memory that the case will use.

    The allocator keeps what is freed here.  A contender holds its output, the others theirs, and
    a call some more for a moment: with the operands about a dozen tensors of the case's size.
    """
    torch.ones(14 * case.nbytes, dtype=torch.uint8)


def _prepare(
    contender: str, case: Case, data: Data, expected: object
) -> tuple[Call | None, object, str]:
    """The contender's call, what all should return (torch.nn comes first), and what went wrong."""
    try:
        call = build(contender, case, data)
        result = call()
        if expected is None:
            return call, result, ""
        wrong = disagreement(case, result, expected)
        return (None, expected, wrong) if wrong else (call, expected, "")
    except Exception as error:  # a missing compiler is a finding, not a crash
        return None, expected, _one_line(error)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def run(job: dict[str, Any], out: TextIO) -> None:
    """Measure every case of `job` and write its rows to `out`."""
    torch.set_num_threads(job["threads"])
    _import_once({name for item in job["cases"] for name in item["contenders"]})
    _send(out, {"torch": torch.__version__})
    plan = Plan(**job["plan"])
    for item in job["cases"]:
        case = Case.from_dict(item["case"])
        _in_a_fork(job["regime"], case, item["contenders"], plan, out)


def _import_once(contenders: Collection[str]) -> None:
    """Import what a fork would otherwise import again for its case, in seconds each time."""
    if COMPILE in contenders:
        importlib.import_module("torch._inductor.compile_fx")
    if OURS in contenders and importlib.util.find_spec("normwise") is not None:
        importlib.import_module("normwise")


def _in_a_fork(regime: str, case: Case, contenders: Sequence[str], plan: Plan, out: TextIO) -> None:
    def measure_and_send() -> None:
        rows = measure_case(regime, case, contenders, plan)
        _send(out, {"rows": [row.to_dict() for row in rows]})

    if not hasattr(os, "fork"):
        measure_and_send()
        return
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            measure_and_send()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)  # not sys.exit: the parent's buffers and handlers are not ours to run
    _, status = os.waitpid(child, 0)
    if status:
        error = f"the case's process ended with code {os.waitstatus_to_exitcode(status)}"
        _send(
            out, {"rows": [Row(regime, case, name, error=error).to_dict() for name in contenders]}
        )


def _send(out: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=out, flush=True)


def main() -> None:
    # What a library or a compiler prints to stdout must not end up between the JSON lines.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        run(json.load(sys.stdin), out)


if __name__ == "__main__":
    main()
