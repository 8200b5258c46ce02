"""``watch``: what the norms of a model see and do through training, at next to no cost."""

from normwise.tools.watch.main import watch
from normwise.tools.watch.record import WatchRecord

__all__ = ["WatchRecord", "watch"]
