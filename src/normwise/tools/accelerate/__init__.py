"""``accelerate``: every norm of a model by our kernels, fused with what follows it."""

from normwise.tools.accelerate.main import accelerate
from normwise.tools.accelerate.report import REASONS, AccelerateReport

__all__ = ["REASONS", "AccelerateReport", "accelerate"]
