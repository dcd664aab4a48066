"""Made-up cells of accuracies, and their table: for tests of frames, tables and figures."""

import csv
import io

from ratplus_exp.analysis import TASKS, accuracies
from ratplus_exp.report import Table
from ratplus_exp.report.accuracy import accuracy_table
from ratplus_exp.report.results import Results
from ratplus_exp.store import Store

QUEST = {"method": "quest", "block_size": 8, "top_k": 4, "budget": "1/16", "selector": "topk"}
DENSE = {"method": "dense", "block_size": None, "top_k": None, "budget": "1", "selector": "topk"}


def add(store: Store, backbone: str, task: str, right: int, n: int = 10, **key) -> None:
    """A cell whose first `right` of n samples are right by exact match."""
    key = QUEST | {"checkpoint": f"digest-{backbone}", "seed": 0, "tier": "pocket"} | key
    key |= {"stage": "eval", "backbone": backbone, "task": task, "context_length": 512}
    cell = store.cell({"model": f"pocket_{backbone}", **key})
    with cell.open({"commit": "abc"}):
        cell.append(
            [{"id": f"{task}-{i}", "exact": float(i < right), "substring": 0.5} for i in range(n)]
        )
        measured = {"budget_measured": 0.07, "effective_memory_length": 60.0, "gate_mean": 0.9}
        cell.finish(accuracies(cell.records()) | measured)


def add_all(store: Store, attention: int, ratplus: int, tasks=TASKS, **key) -> None:
    for task in tasks:
        add(store, "attention", task, attention, **key)
        add(store, "ratplus", task, ratplus, **key)


def make(store: Store, name: str = "table3", tier: str = "pocket", **options) -> Table:
    choices = {x: options.pop(x) for x in ("scorer", "first_token", "protocol") if x in options}
    return accuracy_table(Results.read(store, {"tier": tier} | options, **choices), name)


def lines(table: Table, **want: str) -> list[dict[str, str]]:
    """The rows with these texts, by column."""
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    return [row for row in rows if all(row[name] == value for name, value in want.items())]
