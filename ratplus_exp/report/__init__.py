"""Reports: tables, figures and the page, their words in templates, the paper's numbers as data."""

from ratplus_exp.report.paper import paper_tables
from ratplus_exp.report.prose import MISSING
from ratplus_exp.report.table import Table

__all__ = ["MISSING", "Table", "paper_tables"]
