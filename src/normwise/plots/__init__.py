"""Pictures of what norms do, drawn with matplotlib (``normwise[plots]``) from the library's own
numbers.

Each function returns the matplotlib Figure. ``path=`` saves it (the suffix says the format);
``ax=`` draws on axes of yours, one for each panel. Nothing global changes: no backend, no
``rcParams``.
"""

from normwise.errors import MissingDependencyError, message

try:
    from normwise.plots.activation_map import activation_map
    from normwise.plots.input_histogram import input_histogram
    from normwise.plots.momentum_chase import momentum_chase
    from normwise.plots.norm_cubes import norm_cubes
    from normwise.plots.percentiles import percentiles
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "matplotlib":
        raise
    raise MissingDependencyError(
        message(
            "pictures need matplotlib",
            "a Python that cannot import it",
            'pip install "normwise[plots]"',
        )
    ) from error

__all__ = ["activation_map", "input_histogram", "momentum_chase", "norm_cubes", "percentiles"]
