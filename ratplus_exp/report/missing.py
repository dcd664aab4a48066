"""Cells that the paper's tables and figures need and that are not finished."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pandas as pd

from ratplus_exp.analysis.frame import BACKBONES, SETTING, TASKS, grouped
from ratplus_exp.report.paper import PAPER_TABLES
from ratplus_exp.report.prose import METHODS, setting_name
from ratplus_exp.report.results import Results

SEEDS = 5  # of random selection, in the paper
BUDGETS = ("1/4", "1/8", "1/16")
HITS = {"fig2": (["quest"], BUDGETS), "fig3": (["snapkv"], BUDGETS)} | {
    "fig4": (["quest", "snapkv"], BUDGETS[-1:])
}


class Need(NamedTuple):
    """Cells that a table or figure needs of each backbone."""

    method: str
    block_size: int
    budget: str
    selector: str
    hits: bool = False


def missing(results: Results, outputs: Iterable[str]) -> list[str]:
    """One sentence for each setting of the outputs (as in stage.outputs) without all its tasks or
    seeds."""
    labels: dict[str, list[str]] = {}
    for output in sorted(outputs, key=lambda name: (name not in PAPER_TABLES, name)):
        label = f"{'Table' if output in PAPER_TABLES else 'Figure'} {output[-1]}"
        for need, tasks in _needs(output, results):
            frame = results.rates if need.hits else grouped(results.cells)
            for lack in _lacking(frame, need, tasks):
                labels.setdefault(lack, []).append(label)
    return [f"{lack} ({', '.join(dict.fromkeys(names))})." for lack, names in labels.items()]


def _needs(output: str, results: Results) -> Iterator[tuple[Need, tuple[str, ...]]]:
    """The needs of an output, with their tasks."""
    table3 = results.paper("table3")
    blocks = table3[table3["paper_block"].isin([1, 64])].groupby("method")["block_size"].first()
    if output in ("table3", "table4", "table5", "fig1"):
        yield Need("dense", 1, "1", "dense"), TASKS
    if output in PAPER_TABLES:
        paper = results.paper(output)
        tasks = tuple(paper["task"].unique())
        settings = paper[[*SETTING, "selector"]].drop_duplicates()
        for need in map(Need._make, settings.assign(hits=False).to_numpy().tolist()):
            if need.block_size > 0:
                yield need, tasks
    if output == "table5":
        for method in METHODS:
            for selector in ("topk", "oracle"):
                yield Need(method, blocks[method], "1/4", selector), TASKS
    methods, budgets = HITS.get(output, (list(METHODS), BUDGETS if output == "fig1" else ()))
    for method in methods:
        for budget in budgets:
            yield Need(method, blocks[method], budget, "topk", output in HITS), TASKS


def _lacking(frame: pd.DataFrame, need: Need, tasks: tuple[str, ...]) -> Iterator[str]:
    """A sentence for each backbone without some of the tasks, or seeds of random selection."""
    cells = frame[(frame[[*SETTING, "selector"]] == list(need[:4])).all(axis=1)]
    for backbone in BACKBONES:
        seeds = cells[cells["backbone"] == backbone].groupby("task")["selector_seed"].nunique()
        needed = SEEDS if need.selector == "random" else 1
        name = f"{backbone}, {'hit rates of ' if need.hits else ''}{setting_name(*need[:4])}"
        absent = [task for task in tasks if task not in seeds]
        few = [task for task in tasks if 0 < seeds.get(task, 0) < needed]
        if absent:
            yield name + _on(absent, tasks)
        if few:
            yield f"{name}: {seeds[few].min()} of {SEEDS} seeds{_on(few, tasks)}"


def _on(lacking: list[str], tasks: tuple[str, ...]) -> str:
    return "" if len(lacking) == len(tasks) else f", on {', '.join(lacking)}"
