"""The main job on real data: batch norm at work on handwritten digits.

``normwise demo`` on the command line, ``normwise.demo.run()`` here. After figure 1 of Ioffe &
Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift" (2015), https://arxiv.org/abs/1502.03167.
"""

from ..errors import OutputError
from .experiment import run
from .requirements import MissingDependencyError, require
from .result import DemoResult, NetworkResult
from .verify import Agreement

__all__ = [
    "run",
    "DemoResult",
    "NetworkResult",
    "Agreement",
    "require",
    "MissingDependencyError",
    "OutputError",
]
