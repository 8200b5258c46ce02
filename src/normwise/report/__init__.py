"""Several results on one page, and results that were written as JSON.

>>> import torch, normwise as nw
>>> from normwise.report import compose
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8)).eval()
>>> x = torch.randn(16, 4)
>>> page = compose(nw.check(net), nw.fold(net, x, seconds=0), title="my net")
>>> [section.title for section in page.sections]
['check', 'fold']
"""

from normwise.report.compose import Shown, compose, save
from normwise.report.reading import from_dict, load

__all__ = ["Shown", "compose", "from_dict", "load", "save"]
