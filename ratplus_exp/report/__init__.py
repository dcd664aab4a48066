"""Reports: tables, figures and the page; texts are templates, the paper's numbers data."""

from ratplus_exp.report.paper import paper_tables
from ratplus_exp.report.table import Table

__all__ = ["Table", "paper_tables"]
