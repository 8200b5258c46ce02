"""Models as graphs: recorded once, their norms found and folded into the layers around them."""

from normwise.graph.folding import FoldResult, fold
from normwise.graph.reasons import REASONS
from normwise.graph.report import FoldReport
from normwise.graph.saving import load_folded

__all__ = ["REASONS", "FoldReport", "FoldResult", "fold", "load_folded"]
