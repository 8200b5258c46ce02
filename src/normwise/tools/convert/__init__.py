"""``normwise.convert()``: one kind of norm into another, and back.

What a norm is (specs), what it becomes (targets), all norms of a model (main).
"""

from normwise.tools.convert.main import ConvertReport, convert
from normwise.tools.convert.targets import REASONS, TARGETS

__all__ = ["REASONS", "TARGETS", "ConvertReport", "convert"]
