"""The JavaScript of Vega, Vega-Lite and Vega-Embed, out of the package vl-convert-python.

Why Vega-Lite: a chart is JSON, its SVG has accessible names, and its expressions run in an
interpreter, so that a page can forbid ``eval``. 0.9 MB of script; plotly.js has 4.7. And why not
Altair, which writes the same JSON: it would bring four packages to build a dictionary.
"""

from __future__ import annotations

from functools import cache

__all__ = ["HOW_TO_GET_CHARTS", "charts_library"]

HOW_TO_GET_CHARTS = "Charts are drawn if vl-convert-python is there: pip install 'normwise[report]'"


# What the bundle makes public.
_EXPORTS = "window.vegaEmbed = vegaEmbed;"


@cache
def charts_library() -> str | None:
    """A script that defines ``vegaEmbed``; None where the package is missing. Takes 2 s once."""
    try:
        from vl_convert import javascript_bundle
    except ImportError:
        return None
    # The file is one module: its names stay inside.
    script: str = "(() => {" + javascript_bundle(_EXPORTS) + "\n})();"
    if "</script" in script.lower() or "<!--" in script or "\r" in script:
        return None  # would end its element; has not been seen
    return script
