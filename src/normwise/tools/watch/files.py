"""Where rows go to beside the record: JSON lines, Parquet, TensorBoard."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from normwise.errors import InputError, MissingDependencyError, OutputError, message
from normwise.files import write_atomically
from normwise.results import plain
from normwise.tools.watch.call import GRADIENTS, SPREADS, columns
from normwise.tools.watch.measure import GAPS

__all__ = ["JsonLines", "Parquet", "Scalars", "open_file", "read_rows", "steadfast"]

LINES, TABLE = (".jsonl", ".ndjson"), (".parquet",)


def _require(module: str, package: str, what: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            message(
                f"{what} needs {package}",
                f"a Python that cannot import {module.partition('.')[0]}",
                'pip install "normwise[watch]"',
            )
        ) from error


def _wrong_suffix(path: Path) -> InputError:
    return InputError(
        message(
            f"the file's name ends in {', '.join((*LINES, *TABLE))}",
            repr(os.fspath(path)),
            "'watch.jsonl'",
        )
    )


class JsonLines:
    """A line for each row, written whole: what was written stays readable whatever happens.

    Rows are appended to a file that is there, after the end of a line that a crash cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Unbuffered: a line is with the system once it is written, if the process dies too.
            self.file: BinaryIO = path.open("ab+", buffering=0)
            if self.file.tell():
                self.file.seek(-1, os.SEEK_END)
                if self.file.read(1) != b"\n":
                    self.file.write(b"\n")
        except OSError as error:
            raise OutputError(
                message(
                    "an output must be writable",
                    f"{os.fspath(path)!r} ({error})",
                    "a path in a directory that exists and takes files",
                )
            ) from error

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
        self.file.write(lines.encode())

    def close(self) -> None:
        self.file.close()


class Parquet:
    """Lines beside the file while it runs (``<name>.jsonl``), which become the file at the end.

    A Parquet file without its end cannot be read, so a crash leaves the lines; the next run on the
    same path takes them in.
    """

    def __init__(self, path: Path, percentiles: Sequence[float]) -> None:
        _require("pyarrow.parquet", "pyarrow", "a Parquet file")
        self.path, self.percentiles = path, percentiles
        self.before = read_rows(path) if path.exists() else []
        self.lines = JsonLines(path.with_name(path.name + ".jsonl"))
        self.write = self.lines.write

    def close(self) -> None:
        import pyarrow
        from pyarrow import parquet

        self.lines.close()
        rows = [*self.before, *read_rows(self.lines.path)]
        texts = ("mode", "name", "kind")
        whole = ("step", "call", "values", "nonfinite", "nonfinite_grads")
        kinds = {
            **dict.fromkeys(columns(self.percentiles), pyarrow.float64()),
            **dict.fromkeys(texts, pyarrow.string()),
            **dict.fromkeys(whole, pyarrow.int64()),
            "training": pyarrow.bool_(),
        }
        schema = pyarrow.schema(list(kinds.items()))
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        write_atomically(self.path, lambda file: parquet.write_table(table, file))
        self.lines.path.unlink(missing_ok=True)


def open_file(
    path: str | os.PathLike[str], percentiles: Sequence[float], rank: int, ranks: int
) -> JsonLines | Parquet:
    """The file by its suffix; of several ranks each has its own, ``<name>.rank<i><suffix>``."""
    target = Path(path)
    if target.suffix not in (*LINES, *TABLE):
        raise _wrong_suffix(target)
    if ranks > 1:
        target = target.with_name(f"{target.stem}.rank{rank}{target.suffix}")
    return Parquet(target, percentiles) if target.suffix in TABLE else JsonLines(target)


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file; a line that a crash cut off is left out."""
    source = Path(path)
    if source.suffix in TABLE:
        parquet = _require("pyarrow.parquet", "pyarrow", "a Parquet file")
        try:
            rows: list[dict[str, Any]] = parquet.read_table(source).to_pylist()
        except ValueError as error:  # pyarrow.ArrowInvalid
            raise InputError(
                message("a Parquet file", f"{os.fspath(path)!r} ({error})", "the file of a run")
            ) from error
        return rows
    if source.suffix not in LINES:
        raise _wrong_suffix(source)
    rows = []
    for line in source.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # cut off, or no UTF-8
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class Scalars:
    """``add_scalar(tag, value, step)`` for each figure of each norm's first call in a forward.

    Tags are ``watch/<norm>/<column>``, ``watch_eval/…`` in eval mode. With a directory all figures
    of a step are one event: SummaryWriter makes an event of each, at 60 to 95 us (a norm has 28).
    """

    def __init__(self, target: Any) -> None:
        self.events: Any = None
        self.target = target
        if isinstance(target, (str, os.PathLike)):
            self.summary = _require(
                "tensorboard.compat.proto.summary_pb2", "tensorboard", "TensorBoard's log"
            ).Summary
            writer = _require("torch.utils.tensorboard.writer", "tensorboard", "TensorBoard's log")
            self.events = writer.FileWriter(os.fspath(target))
        elif not callable(getattr(target, "add_scalar", None)):
            raise InputError(
                message(
                    "tensorboard= is a directory or has a method add_scalar(tag, value, step)",
                    f"a {type(target).__name__}",
                    "torch.utils.tensorboard.SummaryWriter(directory)",
                )
            )

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        steps: dict[int, list[tuple[str, Any]]] = {}
        for row in rows:
            if row["call"]:
                continue
            top = "watch" if row["mode"] == "train" else "watch_eval"
            steps.setdefault(row["step"], []).extend(
                (f"{top}/{row['name']}/{name}", value)
                for name, value in row.items()
                if value is not None
                and (name in (*GAPS, *GRADIENTS, "nonfinite") or name.partition("_p")[0] in SPREADS)
            )
        for step, scalars in steps.items():
            if self.events is None:
                for tag, value in scalars:
                    self.target.add_scalar(tag, value, step)
            else:
                values = [self.summary.Value(tag=t, simple_value=v) for t, v in scalars]
                self.events.add_summary(self.summary(value=values), step)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


def steadfast(write: Callable[[Any], None], what: str) -> Callable[[Any], None]:
    """``write`` that warns once when it fails, and is silent from then on: a full disk shall end
    the log, not the training."""
    failed = False

    def attempt(rows: Any) -> None:
        nonlocal failed
        if failed:
            return
        try:
            write(rows)
        except OSError as error:
            failed = True
            warnings.warn(f"watch: {what} gets no more rows ({error})", stacklevel=2)

    return attempt
