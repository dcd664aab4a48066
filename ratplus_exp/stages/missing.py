"""Cells that the tables and figures of a report need and that are not finished."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from ratplus_exp.analysis.frame import BACKBONES, DENSE, SETTING, TASKS, grouped
from ratplus_exp.report.paper import PAPER_TABLES
from ratplus_exp.report.prose import setting_name
from ratplus_exp.report.results import Results
from ratplus_exp.stages.common import multiply

BLOCKS = 64  # of a context, where a grid does not say it
Grid = Mapping[str, Any]


def missing(results: Results, cells: Mapping[str, Mapping[str, Grid]]) -> list[str]:
    """One sentence for each setting without all its trainings, tasks or seeds.

    cells: `stage.cells` of each output's experiment (conf/experiment/table3.yaml).
    """
    labels: dict[str, list[str]] = {}
    for output in sorted(cells, key=lambda name: (name not in PAPER_TABLES, name)):
        label = f"{'Table' if output in PAPER_TABLES else 'Figure'} {output[-1]}"
        for grid in cells[output].values():
            frame, measured = grouped(results.cells), ""
            if grid.get("stage") == "hit_rate":
                frame, measured = results.rates, "hit rates of "
            for setting in _settings(grid, results):
                of_setting = frame[(frame[[*SETTING, "selector"]] == list(setting)).all(axis=1)]
                for backbone, lack in _lacking(of_setting, grid, results.trainings):
                    sentence = f"{backbone}, {measured}{setting_name(*setting)}{lack}"
                    labels.setdefault(sentence, []).append(label)
    return [f"{text} ({', '.join(dict.fromkeys(names))})." for text, names in labels.items()]


def _settings(grid: Grid, results: Results) -> Iterator[tuple[str, int, str, str]]:
    """SETTING and selector of each combination in a grid."""
    paper = results.paper("table3")
    of_blocks = set(paper.loc[paper["paper_block"] > 1, "method"])
    size, rest = divmod(results.context, grid.get("blocks", BLOCKS))
    axes = {"budget": "1", "selector": "topk", **grid}
    for entry in multiply({name: axes[name] for name in ("method", "budget", "selector")}):
        method, budget, selector = entry.values()
        if method == "dense":
            yield DENSE
        elif method not in of_blocks or not rest:  # a sweep refuses other blocks
            yield method, size if method in of_blocks else 1, budget, selector


def _lacking(
    cells: pd.DataFrame, grid: Grid, trainings: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """Each backbone whose cells lack some of a grid's tasks, or seeds of its selector, and what, in
    which trainings."""
    for backbone in BACKBONES:
        lacks: dict[str, list[int]] = {}
        for training in trainings:
            of = cells[(cells["backbone"] == backbone) & (cells["training"] == training)]
            for lack in _lacks(of, grid):
                lacks.setdefault(lack, []).append(training)
        for lack, numbers in lacks.items():
            some = f", training {', '.join(map(str, numbers))}"
            yield backbone, (some if len(numbers) < len(trainings) else "") + lack


def _lacks(cells: pd.DataFrame, grid: Grid) -> Iterator[str]:
    """What the cells of one training lack of a grid's tasks and of the seeds of its selector."""
    tasks = grid.get("tasks", TASKS)
    needed = len({entry.get("selector_seed") for entry in multiply(grid)})
    seeds = cells.groupby("task")["selector_seed"].nunique().reindex(list(tasks), fill_value=0)
    for lacking in (seeds[seeds == 0], seeds[(seeds > 0) & (seeds < needed)]):
        on = f", on {', '.join(lacking.index)}" if len(lacking) < len(tasks) else ""
        if len(lacking):
            yield (f": {lacking.min()} of {needed} seeds" if lacking.min() else "") + on
