"""Results: the append-only store, tidy frames, statistics, tables, and the paper's own numbers."""

from ratplus_exp.results.files import StoreBusy, locked, write_atomically
from ratplus_exp.results.frame import accuracies, sample_scores, tidy, write_cells_csv
from ratplus_exp.results.layout import MISSING, Table
from ratplus_exp.results.paper import paper_means, paper_tables
from ratplus_exp.results.stats import mean_std, paired_bootstrap
from ratplus_exp.results.store import FORMAT, Cell, Store
from ratplus_exp.results.tables import accuracy_table, table3

__all__ = [
    "FORMAT",
    "MISSING",
    "Cell",
    "Store",
    "StoreBusy",
    "Table",
    "accuracies",
    "accuracy_table",
    "locked",
    "mean_std",
    "paired_bootstrap",
    "paper_means",
    "paper_tables",
    "sample_scores",
    "table3",
    "tidy",
    "write_atomically",
    "write_cells_csv",
]
