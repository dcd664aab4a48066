"""The paper's Tables 2-5 with measured numbers."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pandas as pd

from ratplus_exp.analysis.bootstrap import spread
from ratplus_exp.analysis.frame import (
    ALL_TASKS,
    BACKBONES,
    DENSE,
    SETTING,
    LeftOut,
    backbones_of,
    grouped,
)
from ratplus_exp.report.paper import PAPER_TABLES
from ratplus_exp.report.prose import MISSING, bounds, number, plus_minus, span
from ratplus_exp.report.results import Results
from ratplus_exp.report.table import Table

COUNTS = ("n", "trainings", "seeds")


def accuracy_table(results: Results, name: str) -> Table:
    """The paper's layout, settings × backbones × tasks, with measured numbers: dense rows, then the
    paper's settings, then other measured ones.

    Only cells with the paper table's selector (top-k or random) count. A mean needs all tasks of
    the paper's table.

    name: "table2" to "table5". LeftOut if no finished cell fits, or several fit one place.
    """
    paper = results.paper(name)
    tasks, selector = list(paper["task"].unique()), paper["selector"].iloc[0]
    cells = grouped(results.cells)
    cells = cells[cells["backbone"].isin(BACKBONES) & cells["task"].isin(tasks)]
    cells = cells[cells["selector"].isin([selector, "dense"])]
    if cells.empty:
        raise LeftOut(f"no finished cells for {name}: run make {name}")
    of_paper, measured = (
        x[SETTING].drop_duplicates().itertuples(index=False, name=None) for x in (paper, cells)
    )
    extra = sorted(measured, key=lambda s: (*s[:2], -Fraction(s[2])))
    settings = list(dict.fromkeys([DENSE[:3], *of_paper, *extra]))
    printed = paper.groupby([*SETTING, "backbone"], sort=False)["accuracy"].mean().unstack()
    printed = printed.reindex(pd.MultiIndex.from_tuples(settings))
    backbones = backbones_of(cells)
    rows: list[tuple[Any, ...]] = []
    for setting in settings:
        method, block, budget = setting
        if block < 0:  # the paper's block size has no counterpart in this context
            continue
        of_setting = cells[(cells[SETTING] == list(setting)).all(axis=1)]
        stored = of_setting["top_k"].dropna()
        top_k = stored.iloc[0] if len(stored) else Fraction(budget) * results.context / block
        dense = setting == DENSE[:3]
        sizes = ("", "") if dense else (block, str(top_k))
        values = printed.loc[setting]
        groups = [(*setting, "dense" if dense else selector, b) for b in BACKBONES]
        gain = results.draws.gain(groups[1], groups[0], tasks)
        paper_gain = number(values["RAT+"] - values["Attention"], sign="+")
        gains = (number(gain.value, sign="+"), bounds(gain), paper_gain)
        for backbone, texts, n, side in _sides(of_setting, backbones, tasks, results.scorer):
            draws = side.drop_duplicates(["training", "seed", "selector_seed"])
            seeds = draws.groupby("training").size()
            counts = (len(seeds), seeds.max()) if len(side) else (MISSING, MISSING)
            shown = gains if backbone == "RAT+" else ("", "", "")
            rows.append((method, *sizes, budget, *texts, values[backbone], *shown, n, *counts))
    columns = ("Method", "Block", "k", "Budget", "Kept", "Backbone", *tasks, "Mean", "Paper")
    columns = (*columns, "Δ", "Δ 95 %", "Paper Δ", *COUNTS)
    distinct = [{row[i] for row in rows} - {MISSING} for i in range(-len(COUNTS), 0)]
    uniform = [name for name, x in zip(COUNTS, distinct, strict=True) if len(x) == 1]
    models = cells.groupby(["backbone", "model", "checkpoint"])["effective_memory_length"].mean()
    hide = ("Paper", *uniform)  # the caption has what all rows share
    caption = {"r": results, "table": name[-1], "of": PAPER_TABLES[name], "cells": cells}
    caption["models"] = [(*model, number(memory)) for model, memory in models.items()]
    caption |= {"pair": len(backbones) > 1, "n": span(cells["n"])}
    table = Table.described("accuracy", columns, rows, hide=hide, **caption)
    return table if caption["pair"] else table.without(("Δ", "Δ 95 %", "Paper Δ"))


def tasks_table(results: Results) -> Table:
    """All tasks measured under top-k, of both protocols; dense rows first. LeftOut as in
    `accuracy_table`."""
    cells = results.of_protocols
    if cells.empty:
        raise LeftOut("no finished cells for tasks: run make ruler13 or make protocols")
    tasks = [task for task in ALL_TASKS if task in set(cells["task"])]
    place = [*SETTING, "selector", "protocol"]
    rows: list[tuple[Any, ...]] = []
    for group in sorted(
        set(cells[place].itertuples(index=False, name=None)),
        key=lambda g: (g[:4] != DENSE, *g[:2], -Fraction(g[2]), g[4] == "split"),
    ):
        method, block, budget, _, protocol = group
        of_group = cells[(cells[place] == list(group)).all(axis=1)]
        draws = results.draws_of(protocol)
        gain = draws.gain((*group[:4], "RAT+"), (*group[:4], "Attention"), tasks)
        label = (method, "" if group[:4] == DENSE else block, budget, protocol)
        for backbone, texts, n, _ in _sides(of_group, backbones_of(cells), tasks, results.scorer):
            rows.append((*label, *texts, gain if backbone == "RAT+" else "", n))
    columns = ("Method", "Block", "Budget", "Protocol", "Kept", "Backbone", *tasks)
    return Table.described("tasks", (*columns, "Mean", "Δ", "n"), rows, group=4, r=results)


def _sides(
    cells: pd.DataFrame, backbones: list[str], tasks: list[str], scorer: str
) -> Iterator[tuple[str, tuple[str, ...], str, pd.DataFrame]]:
    """Of each backbone its name; the texts of Kept and Backbone, of each task's mean, and of the
    mean over all tasks if none is missing; n; and its cells."""
    for backbone in backbones:
        side = cells[cells["backbone"] == backbone]
        of_task = dict(iter(side.groupby("task")))
        parts = [*map(of_task.get, tasks), side if len(of_task) == len(tasks) else None]
        means = (MISSING if x is None else plus_minus(*spread(x, scorer)[:2]) for x in parts)
        kept = number(side["budget_measured"].mean(), digits=3)
        yield backbone, (kept, backbone, *means), span(side["n"]), side
