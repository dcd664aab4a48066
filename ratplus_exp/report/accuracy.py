"""The paper's Tables 2-5 with measured numbers."""

from __future__ import annotations

from fractions import Fraction

import pandas as pd

from ratplus_exp.analysis.bootstrap import spread
from ratplus_exp.analysis.frame import BACKBONES, GROUP, SETTING, grouped
from ratplus_exp.report.paper import PAPER_TABLES
from ratplus_exp.report.prose import MISSING, bounds, number, plus_minus, span
from ratplus_exp.report.results import Results
from ratplus_exp.report.table import Table

DENSE = ("dense", 1, "1")
COUNTS = ("n", "trainings", "seeds")


def accuracy_table(results: Results, name: str) -> Table:
    """The paper's layout, settings × backbones × tasks, with measured numbers; dense rows first.

    All the paper's settings appear, and after them the measured settings that the paper lacks. Only
    cells with the paper table's selector (top-k or random) count. A mean over tasks appears once
    all of the paper table's are there.

    Args:
        name: "table2" to "table5".

    Raises:
        ValueError: no finished cell fits, or several would share one place in the table.
    """
    paper = results.paper(name)
    tasks, selector = list(paper["task"].unique()), paper["selector"].iloc[0]
    cells = grouped(results.cells)
    cells = cells[cells["backbone"].isin(BACKBONES) & cells["task"].isin(tasks)]
    cells = cells[cells["selector"].isin([selector, "dense"])]
    if cells.empty:
        raise ValueError(f"no finished cells for {name}: run make {name}")
    _check_unmixed(cells)
    printed = paper.groupby([*SETTING, "backbone"], sort=False)["accuracy"].mean().unstack()
    measured = {tuple(s) for s in cells[SETTING].itertuples(index=False)}
    extra = sorted(measured, key=lambda s: (s[0], s[1], -Fraction(s[2])))
    rows: list[tuple[str, ...]] = []
    for setting in dict.fromkeys(
        [DENSE, *paper[SETTING].itertuples(index=False, name=None), *extra]
    ):
        method, block, budget = setting
        if block < 0:  # the paper's block size has no counterpart in this context
            continue
        here = cells[(cells[SETTING] == list(setting)).all(axis=1)]
        stored = here["top_k"].dropna()
        top_k = stored.iloc[0] if len(stored) else Fraction(budget) * results.context / block
        label = (
            ("dense", "", "", "1") if setting == DENSE else (method, str(block), str(top_k), budget)
        )
        theirs = printed.loc[setting] if setting in printed.index else dict.fromkeys(BACKBONES)
        groups = [(*setting, "dense" if setting == DENSE else selector, b) for b in BACKBONES]
        gain = results.draws.gain(groups[1], groups[0], tasks)
        paper_gain = theirs["RAT+"] - theirs["Attention"] if theirs["RAT+"] is not None else None
        gains = (number(gain.value, sign="+"), bounds(gain), number(paper_gain, sign="+"))
        for backbone in BACKBONES:
            side = here[here["backbone"] == backbone]
            of_task = dict(iter(side.groupby("task")))
            whole = spread(side, results.scorer) if len(of_task) == len(tasks) else None
            means = [spread(of_task[t], results.scorer) if t in of_task else None for t in tasks]
            draws = side.drop_duplicates(["training", "seed", "selector_seed"])
            of_training = draws.groupby("training").size()
            rows.append(
                (
                    *label,
                    number(side["budget_measured"].mean(), digits=3),
                    backbone,
                    *(plus_minus(*x[:2]) if x else MISSING for x in (*means, whole)),
                    number(theirs[backbone]),
                    *(gains if backbone == "RAT+" else ("", "", "")),
                    span(side["n"]),
                    *(
                        str(x) if len(side) else MISSING
                        for x in (len(of_training), of_training.max())
                    ),
                )
            )
    columns = ("Method", "Block", "k", "Budget", "Kept", "Backbone", *tasks, "Mean", "Paper")
    columns = (*columns, "Δ", "Δ 95 %", "Paper Δ", *COUNTS)
    values = [{row[i] for row in rows} - {MISSING} for i in range(-len(COUNTS), 0)]
    uniform = [name for name, x in zip(COUNTS, values, strict=True) if len(x) == 1]
    hide = ("Paper", *uniform)  # the caption says what all rows share
    models = cells.groupby(["backbone", "model", "checkpoint"])["effective_memory_length"].mean()
    return Table.described(
        "accuracy",
        columns,
        rows,
        hide=hide,
        r=results,
        table=name[-1],
        of=PAPER_TABLES[name],
        cells=cells,
        n=span(cells["n"]),
        models=[(*model, number(memory)) for model, memory in models.items()],
    )


def _check_unmixed(cells: pd.DataFrame) -> None:
    """ValueError if cells of unlike origin would share a row or a place."""
    origin = ["backbone", "training", "seed", "selector_seed"]
    scopes = {
        "context_length": ["tier"],
        "model": origin,
        "checkpoint": origin,
        "variant": SETTING,
        "cell": [*origin, *GROUP[:-1], "task"],
        "training": ["backbone", "checkpoint"],
    }
    for column, scope in scopes.items():
        for _, group in cells.groupby(scope, dropna=False):
            values = sorted(map(str, group[column].unique()))
            if len(values) > 1:
                first = group.iloc[0]
                raise ValueError(
                    f"the table would mix results of several {column}s ({', '.join(values)}; "
                    f"{first['backbone']} {first['method']}, seed {first['seed']}): choose which, "
                    f"as in stage.where={{{column}: [{values[0]}, …]}}, one for each backbone"
                )
