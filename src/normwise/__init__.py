"""normwise: batch normalization done right, for people who train and ship PyTorch models.

``import normwise as nw``; ``nw.nn.BatchNorm2d(64)`` replaces ``torch.nn.BatchNorm2d(64)``.
"""

from importlib.metadata import PackageNotFoundError, version

from normwise import errors, functional, nn
from normwise.moments import Moments
from normwise.ops import backends

try:
    __version__ = version("normwise")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Moments", "__version__", "backends", "errors", "functional", "nn"]
