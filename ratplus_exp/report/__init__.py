"""Reports: tables, figures and the page, their words in templates, the paper's numbers as data."""

from ratplus_exp.report.accuracy import accuracy_table
from ratplus_exp.report.paper import paper_means, paper_tables
from ratplus_exp.report.prose import MISSING
from ratplus_exp.report.table import Table

__all__ = ["MISSING", "Table", "accuracy_table", "paper_means", "paper_tables"]
