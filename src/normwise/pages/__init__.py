"""Pages: sections of figures, charts and tables, as data, and what makes one HTML file of them.

Knows nothing of norms. A report says what is on its page
(:meth:`normwise.results.Report.sections`); here it is laid out: one file that needs nothing else,
can be sorted, filtered and walked through by mouse, keyboard and screen reader, and never runs or
loads what its data say.
"""

from normwise.pages.parts import Axis, Chart, Column, Page, Section, Table

__all__ = ["Axis", "Chart", "Column", "Page", "Section", "Table"]
