"""The append-only store of results: one folder per cell."""

from ratplus_exp.store.cells import Cell, Finished, Store
from ratplus_exp.store.files import StoreBusy, locked, naming, remove_drafts, warn, write_atomically

__all__ = [
    "Cell",
    "Finished",
    "Store",
    "StoreBusy",
    "locked",
    "naming",
    "remove_drafts",
    "warn",
    "write_atomically",
]
