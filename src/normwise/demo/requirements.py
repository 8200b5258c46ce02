"""What the demo needs beyond torch and numpy, asked for before anything is computed."""

from __future__ import annotations

from importlib import import_module

from ..errors import MissingDependencyError, message

__all__ = ["MissingDependencyError", "require"]

PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
"""Import name to package name: the ``demo`` extra of pyproject.toml."""


def _import_error(module: str) -> ImportError | None:
    try:
        import_module(module)
    except ImportError as error:
        return error
    return None


def require(*modules: str) -> None:
    """Raises ``MissingDependencyError`` unless each of ``modules`` can be imported."""
    errors = {PACKAGES[m]: error for m in modules if (error := _import_error(m)) is not None}
    if errors:
        raise MissingDependencyError(
            message(
                f"the demo needs {', '.join(PACKAGES[m] for m in modules)}",
                f"a Python that cannot import {', '.join(errors)}",
                'pip install "normwise[demo]"',
            )
        ) from next(iter(errors.values()))
