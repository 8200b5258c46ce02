"""Which rules speak, and where: select, ignore, ignore for a layer, thresholds of severity."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from normwise.doctor.finding import Finding
from normwise.doctor.rule import Rule, all_rules
from normwise.errors import InputError, message

__all__ = ["Config"]

_KEYS = {"select", "ignore", "per-layer-ignores"}


def _matches(pattern: str, rule: Rule | Finding) -> bool:
    name = rule.name if isinstance(rule, Rule) else rule.rule
    return pattern in ("ALL", name) or rule.code.startswith(pattern)


def _known(patterns: Iterable[str] | str | None, where: str) -> tuple[str, ...]:
    """``patterns`` as a tuple, each of which names a rule."""
    given = [patterns] if isinstance(patterns, str) else list(patterns or ())
    for pattern in given:
        ok = isinstance(pattern, str) and pattern
        if not ok or not any(_matches(pattern, one) for one in all_rules()):
            raise InputError(
                message(
                    f"{where} names rules by code, by the start of one, or by name",
                    repr(pattern),
                    "'NW101', 'NW1', 'non-finite-buffer' or 'ALL'",
                )
            )
    return tuple(given)


@dataclass(frozen=True)
class Config:
    """select: rules that run (none named: all). ignore: rules that do not. per_layer: for layers
    whose name matches the pattern (as in a shell, ``'encoder.*'``), findings that are dropped.

    Raises:
        InputError: for a name that is no rule's.
    """

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    per_layer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        select: Iterable[str] | str | None = None,
        ignore: Iterable[str] | str | None = None,
        per_layer: Mapping[str, Iterable[str] | str] | None = None,
    ) -> Config:
        """From arguments as a user writes them."""
        layers = {k: _known(v, f"per_layer[{k!r}]") for k, v in (per_layer or {}).items()}
        return cls(_known(select, "select"), _known(ignore, "ignore"), layers)

    @classmethod
    def from_pyproject(cls, path: str | os.PathLike[str] | None = None) -> Config:
        """The table ``[tool.normwise.check]`` of a pyproject.toml (keys ``select``, ``ignore``,
        ``per-layer-ignores``); of the nearest one above the working directory if ``path`` is None,
        and the defaults if there is none.

        Raises:
            InputError: if the file cannot be read, or a key or a rule is unknown.
        """
        file = _nearest() if path is None else Path(path)
        if file is None:
            return cls()
        table = _table(file)
        unknown = set(table) - _KEYS
        layers = table.get("per-layer-ignores", {})
        if unknown or not isinstance(layers, Mapping):
            raise InputError(
                message(
                    f"[tool.normwise.check] in {file} has the keys {', '.join(sorted(_KEYS))}",
                    ", ".join(sorted(unknown)) or "per-layer-ignores that is no table",
                    'select = ["NW1"]',
                )
            )
        return cls.of(table.get("select"), table.get("ignore"), layers)

    def merged(self, other: Config) -> Config:
        """``other`` on top: what it selects replaces, what it ignores adds."""
        return Config(
            other.select or self.select,
            self.ignore + other.ignore,
            {**self.per_layer, **other.per_layer},
        )

    def runs(self, rule: Rule) -> bool:
        chosen = not self.select or any(_matches(p, rule) for p in self.select)
        return chosen and not any(_matches(p, rule) for p in self.ignore)

    def keeps(self, finding: Finding) -> bool:
        return not any(
            fnmatchcase(finding.layer, layer) and any(_matches(p, finding) for p in patterns)
            for layer, patterns in self.per_layer.items()
        )


def _nearest() -> Path | None:
    here = Path.cwd()
    return next((p for d in (here, *here.parents) if (p := d / "pyproject.toml").is_file()), None)


def _table(file: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    try:
        with file.open("rb") as stream:
            table = tomllib.load(stream).get("tool", {}).get("normwise", {}).get("check", {})
    except (OSError, ValueError) as error:
        raise InputError(
            message("the configuration is a readable TOML file", f"{file}: {error}", "its syntax")
        ) from error
    if not isinstance(table, dict):
        raise InputError(
            message("[tool.normwise.check] is a table", repr(table), "[tool.normwise.check]")
        )
    return table
