"""Answers to what people ask about batch norm, with numbers from the library itself.

``normwise explain`` on the command line. A topic is a Markdown file under ``topics/``, which is
also a page of docs/; its examples are doctests, so no printed number can go stale.

>>> from normwise import explain
>>> explain.find("gamma").id
'scale'
"""

from normwise.explain.examples import run
from normwise.explain.library import Topic, find, topics

__all__ = ["Topic", "find", "run", "topics"]
