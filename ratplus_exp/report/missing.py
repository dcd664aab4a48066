"""What the paper's tables and figures have and the finished cells lack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from ratplus_exp.analysis.frame import BACKBONES, SCORERS, TASKS, select
from ratplus_exp.analysis.pattern import cell_by_cell
from ratplus_exp.report.paper import PAPER_TABLES, paper_tables
from ratplus_exp.report.prose import METHODS, SELECTORS

SEEDS = 5
"""Of random selection, in the paper."""
BUDGETS = ("1/4", "1/8", "1/16")
_HITS = {"fig2": (("quest",), BUDGETS), "fig3": (("snapkv",), BUDGETS)} | {
    "fig4": (("quest", "snapkv"), BUDGETS[-1:])
}


def missing(cells: pd.DataFrame, rates: pd.DataFrame, outputs: Iterable[str]) -> list[str]:
    """One sentence for each setting that some of the outputs need and that lacks tasks or seeds.

    Args:
        cells: rows of `tidy`; rates: of `hit_rates`; one model a backbone.
        outputs: names as in stage.outputs.
    """
    found: dict[str, list[str]] = {}
    for output in sorted(outputs, key=lambda name: (name not in PAPER_TABLES, name)):
        label = f"{'Table' if output in PAPER_TABLES else 'Figure'} {output[-1]}"
        for what in _lacking(output, cells, rates):
            found.setdefault(what, []).append(label)
    return [f"{what} ({', '.join(labels)})." for what, labels in found.items()]


def _lacking(output: str, cells: pd.DataFrame, rates: pd.DataFrame) -> Iterator[str]:
    if output in PAPER_TABLES:
        if output != "table2":  # which is only about random selection
            yield from _absent(cells, {"method": "dense"})
        yield from _absent_from_paper(output, cells)
    if output == "table5":
        for selector in ("topk", "oracle"):
            for method in METHODS:
                yield from _absent(cells, {"method": method, "budget": "1/4", "selector": selector})
    if output == "fig1":
        yield from _absent(cells, {"method": "dense"})
        for method in METHODS:
            for budget in BUDGETS:
                yield from _absent(cells, {"method": method, "budget": budget, "selector": "topk"})
    if output in _HITS:
        methods, budgets = _HITS[output]
        for method in methods:
            for budget in budgets:
                yield from _absent(rates, {"method": method, "budget": budget}, "hit rates of ")


def _absent(frame: pd.DataFrame, where: dict[str, Any], what: str = "") -> Iterator[str]:
    """For each backbone, the tasks that have no row."""
    for backbone in BACKBONES:
        there = set(select(frame, where | {"backbone": backbone})["task"])
        if lacking := [task for task in TASKS if task not in there]:
            yield f"{backbone}, {what}{_named(**where)}{_tasks(lacking, len(TASKS))}"


def _absent_from_paper(table: str, cells: pd.DataFrame) -> Iterator[str]:
    """The paper's settings, each with its block size; if random, with all its seeds."""
    frame = cell_by_cell(paper_tables(table), cells, SCORERS[0])
    place = ["method", "block_size", "budget", "selector", "backbone"]
    for setting, here in frame.groupby(place, sort=False):
        method, block, budget, selector, backbone = setting
        name = f"{backbone}, {_named(method, budget, selector)}"
        name += f" with the paper's block size {block}" if block > 1 else ""
        lacking = here.loc[here["measured"].isna(), "task"]
        if len(lacking):
            yield name + _tasks(list(lacking), len(here))
        few = here[here["measured"].notna() & (here["seeds"] < SEEDS)]
        if selector == "random" and len(few):
            seeds = f"{few['seeds'].min()} of {SEEDS} seeds"
            yield f"{name}: {seeds}{_tasks(list(few['task']), len(here))}"


def _named(method: str, budget: str = "1", selector: str = "topk") -> str:
    if method == "dense":
        return "dense attention"
    chosen = "" if selector == "topk" else f" with {SELECTORS[selector]} selection"
    return f"{METHODS.get(method, method)} at {budget}{chosen}"


def _tasks(lacking: list[str], of: int) -> str:
    return "" if len(lacking) == of else f", on {', '.join(lacking)}"
