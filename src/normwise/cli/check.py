"""``normwise check``: the doctor over a checkpoint or a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import InputError, message
from .inputs import add_data, add_input, add_model, data_of, inputs_of, model_of
from .output import add_output, console, print_json, save_state
from .progress import busy

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from ..doctor import CheckReport, RepairReport

__all__ = ["register"]

SEVERITIES = ("info", "warning", "error")
COLORS = {"info": "cyan", "warning": "yellow", "error": "bold red"}


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``check`` to the command line."""
    parser = subparsers.add_parser(
        "check",
        help="find what is wrong with the norms of a checkpoint or a model",
        description="Reads the norms of a checkpoint (only their tensors, and no code) or of a "
        "model as a linter reads code: named findings, evidence, a remedy. With --input the rules "
        "on structure (NW2xx) run too, with --data those on what data show (NW3xx).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  normwise check model.safetensors
  normwise check --model net:build --weights net.pt --data net:batches
  normwise check model.pt --select NW1 --ignore NW105,tiny-gamma --json
  normwise check model.safetensors --fix --unsafe-fixes -o repaired.safetensors
  normwise check --rules
  normwise explain NW101

Rules can be chosen in pyproject.toml too, under [tool.normwise.check]: select, ignore,
per-layer-ignores.

Exit codes: 0 no finding of severity warning or worse (--fail-on), 1 findings, 2 wrong usage,
a checkpoint that cannot be read, a model that cannot be built or run.""",
    )
    parser.add_argument("path", nargs="?", metavar="PATH", help="a checkpoint: file or folder")
    add_model(parser, required=False)
    add_input(parser)
    add_data(parser)
    for option, what in (("select", "run only these rules"), ("ignore", "leave these rules out")):
        parser.add_argument(
            f"--{option}",
            action="append",
            metavar="RULES",
            help=f"{what}: codes, the start of one, names; with commas",
        )
    parser.add_argument(
        "--per-layer",
        action="append",
        default=[],
        type=_per_layer,
        metavar="PATTERN=RULES",
        help="drop findings of these rules in layers of this name or pattern ('head.*=NW105')",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="the pyproject.toml to read (default: the nearest one)"
    )
    parser.add_argument(
        "--peer",
        dest="peers",
        action="append",
        default=[],
        metavar="FILE",
        help="another checkpoint of the same model (another rank, another step)",
    )
    parser.add_argument(
        "--framework", metavar="NAME", help="where the weights came from: keras, flax, …"
    )
    parser.add_argument(
        "--fail-on",
        choices=SEVERITIES,
        default="warning",
        help="the mildest finding that makes the exit code 1 (default: warning)",
    )
    parser.add_argument("--fix", action="store_true", help="apply the safe fixes; needs -o")
    parser.add_argument(
        "--unsafe-fixes", action="store_true", help="with --fix: those that change outputs too"
    )
    parser.add_argument("--rules", action="store_true", help="list the rules and stop")
    add_output(parser, output="with --fix: the repaired checkpoint (of a model, its state dict)")
    parser.set_defaults(run=run)


def _per_layer(text: str) -> tuple[str, list[str]]:
    pattern, equals, rules = text.partition("=")
    if not (pattern and equals and rules):
        raise argparse.ArgumentTypeError(
            f"it is PATTERN=RULES; got {text!r}. Try: 'head.*=NW105,NW106'"
        )
    return pattern, rules.split(",")


def _split(given: list[str] | None) -> list[str] | None:
    return None if given is None else [r.strip() for text in given for r in text.split(",")]


def _list_rules(as_json: bool) -> int:
    from rich.table import Table

    from ..doctor import all_rules

    rules = all_rules()
    if as_json:
        print_json(
            [
                {"code": r.code, "name": r.name, "severity": r.severity, "needs": r.needs}
                for r in rules
            ]
        )
        return 0
    table = Table(box=None, pad_edge=False)
    for head in ("code", "rule", "severity", "needs"):
        table.add_column(head, no_wrap=True)
    for rule in rules:
        table.add_row(rule.code, rule.name, rule.severity, rule.needs)
    console().print(table)
    return 0


def _usage(arguments: argparse.Namespace) -> None:
    """What argparse cannot say."""

    def wrong(got: str, hint: str) -> InputError:
        what = "check takes a checkpoint or --model, and what goes with it"
        return InputError(message(what, got, hint))

    if (arguments.path is None) == (arguments.model is None):
        got = "neither" if arguments.path is None else "both"
        raise wrong(got, "normwise check model.safetensors, or --model package.module:function")
    if arguments.path is not None:
        for option in ("weights", "data", "inputs"):
            if getattr(arguments, option):
                name = option.removesuffix("s") if option == "inputs" else option
                raise wrong(f"--{name} with a checkpoint", "--model with --weights, then")
    if arguments.fix != (arguments.output is not None):
        got = "--fix without -o" if arguments.fix else "-o without --fix"
        raise wrong(got, "--fix -o repaired.safetensors")
    if arguments.unsafe_fixes and not arguments.fix:
        raise wrong("--unsafe-fixes without --fix", "--fix --unsafe-fixes -o repaired.safetensors")


def run(arguments: argparse.Namespace) -> int:
    """Checks, repairs if asked to, prints, and returns the exit code."""
    if arguments.rules:
        return _list_rules(arguments.json)
    _usage(arguments)
    from ..doctor import Config, check

    config = Config.from_pyproject(arguments.config)
    subject: Any = arguments.path if arguments.model is None else model_of(arguments)
    data = None if arguments.data is None else data_of(arguments.data)
    options: dict[str, Any] = {}
    if arguments.batches is not None:
        options["batches"] = arguments.batches
    with busy("checking"):
        report = check(
            subject,
            data,
            example_inputs=inputs_of(arguments),
            peers=arguments.peers,
            framework=arguments.framework,
            select=_split(arguments.select),
            ignore=_split(arguments.ignore),
            per_layer=dict(arguments.per_layer),
            config=config,
            **options,
        )
    repaired = _repair(subject, report, data, arguments) if arguments.fix else None
    if arguments.html is not None:
        report.save_html(arguments.html)
    if arguments.json:
        more = {} if repaired is None else {"repair": repaired.to_dict()}
        print_json({**report.to_dict(), **more})
    else:
        _print(report, repaired)
    return 1 if _remaining(report, repaired, arguments.fail_on) else 0


def _repair(
    subject: Any, report: CheckReport, data: Any, arguments: argparse.Namespace
) -> RepairReport:
    from ..doctor import repair

    is_path = arguments.model is None
    with busy("repairing"):
        result = repair(
            subject,
            report,
            unsafe=arguments.unsafe_fixes,
            data=data,
            batches=arguments.batches if data is not None else None,
            output=arguments.output if is_path else None,
        )
        if not is_path:
            save_state(result.model, arguments.output)
    return result.report


def _remaining(report: CheckReport, repaired: RepairReport | None, severity: str) -> int:
    """How many findings of this severity or worse are still true."""
    least = SEVERITIES.index(severity)
    # The repair has an entry for each finding, in their order.
    fixed = [e.action == "fixed" for e in repaired] if repaired is not None else []
    fixed += [False] * (len(report.findings) - len(fixed))
    return sum(f.rank >= least and not done for f, done in zip(report.findings, fixed, strict=True))


def _print(report: CheckReport, repaired: RepairReport | None) -> None:
    from rich.text import Text

    screen = console()
    done = [None] * len(report.findings) if repaired is None else list(repaired)
    for finding, entry in zip(report.findings, done, strict=True):
        line = Text(finding.layer or "the model", style="bold")
        line.append(": ", style="not bold")
        line.append(f"{finding.code} {finding.rule}", style=COLORS[finding.severity])
        line.append(f" ({finding.severity}): {finding.message}", style="not bold")
        screen.print(line, soft_wrap=True)
        advice = finding.remedy
        if entry is not None and entry.action == "fixed":
            advice = f"fixed: {entry.facts.get('does', '')}"
        elif entry is not None:
            advice += f" [left: {(entry.reason or '').partition(': ')[2]}]"
        elif finding.repair is not None:
            flag = "--fix" if finding.repair.safe else "--fix --unsafe-fixes"
            advice += f" [{flag}{', with --model and --data' * finding.repair.recalibrate}]"
        screen.print(Text(f"    {advice}"), soft_wrap=True)
    for text in [*report.summary(), *(repaired.summary() if repaired is not None else ())]:
        screen.print(Text(text), soft_wrap=True)
