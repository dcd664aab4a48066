"""All other tables: the pattern, the paper cell by cell, heads, selectors, cost.

`where` is what titles and captions say of the cells: tier, first_token and trainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import Estimate, mean_std
from ratplus_exp.analysis.frame import BACKBONES, SETTING, TASKS, select
from ratplus_exp.analysis.hits import MEAN, TOP, ranked_heads
from ratplus_exp.analysis.pattern import DECISIVE, FEWEST, Pattern
from ratplus_exp.analysis.spread import spread
from ratplus_exp.report.prose import MISSING, SELECTORS, bounds, interval, number, plus_minus
from ratplus_exp.report.table import Table

GAP = "RAT+ − Attention"
_PLACE = ("Method", "Block", "Budget", "Backbone")


def pattern_table(found: Sequence[Pattern], **where: Any) -> Table:
    """All patterns as one table."""
    rows = [
        (
            f"Table {p.table[-1]}",
            p.scope,
            *map(str, (p.decisive, p.measured, p.agree, p.against, p.tied)),
            interval(p.agreement, 0, sign="-"),
            str(p.settings),
            *(interval(x, 2, sign="-") for x in (p.gain, p.attention, p.ratplus)),
        )
        for p in found
    ]
    columns = (
        *("Of paper", "Methods", "Decisive", "Measured", "agree", "against", "tied"),
        *("Agreement, %", "Settings", "ρ of gain", "ρ of Attention", "ρ of RAT+"),
    )
    where |= {"decisive": f"{DECISIVE:g}", "fewest": FEWEST}
    return Table.described("pattern", columns, rows, **where)


def against_table(frame: pd.DataFrame, paper_table: str, **where: Any) -> Table:
    """`cell_by_cell` as a table to read."""
    numbers = {"paper": 1, "paper std": 2, "measured": 1, "measured std": 2, "difference": 1}
    setting = ("method", "block_size", "top_k", "budget", "selector", "backbone", "task")
    counts = ("n", "trainings", "seeds")
    rows = [
        (
            *(str(row[name]) for name in setting),
            *(number(row[name], digits) for name, digits in numbers.items()),
            *(MISSING if pd.isna(row[name]) else str(row[name]) for name in counts),
            number(row["budget_measured"], 3),
        )
        for row in frame.to_dict("records")
    ]
    columns = (
        *("Method", "Paper block", "Paper k", "Budget", "Selector", "Backbone", "Task"),
        *("Paper", "Paper std", "measured", "std", "difference", *counts, "Kept"),
    )
    return Table.described("against", columns, rows, group=0, table=paper_table[-1], **where)


def heads_table(curves: pd.DataFrame, rates: pd.DataFrame, **where: Any) -> Table:
    """The best head, and the mean of all heads, of both backbones: setting × (tasks and mean).

    curves: from `rank_curves`; rates: the rows of `hit_rates` that it was made from.
    """
    ranked, rows = ranked_heads(rates), []
    for setting, here in curves[curves["rank"] == 1].groupby(SETTING, sort=False):
        by_task = here.set_index("task").reindex([*TASKS, MEAN])
        mean = by_task.loc[MEAN]
        gap = _difference(mean)
        for backbone in BACKBONES:
            place = dict(zip(SETTING, setting, strict=True)) | {"backbone": backbone}
            mine = select(ranked, place)
            best = mine[mine["rank"] == 1].sort_values("training")
            rows.append(
                (
                    *map(str, setting),
                    backbone,
                    *(number(by_task.loc[task, backbone]) for task in TASKS),
                    plus_minus(mean[backbone], mean_std(best["hit_rate"])[1]),
                    *((number(gap.value, sign="+"), bounds(gap)) if backbone == "RAT+" else _NONE),
                    ", ".join(f"{head.layer}.{head.head}" for head in best.itertuples()),
                    number(mine["hit_rate"].mean()),
                    f"{mean['n']:.0f}",
                )
            )
    columns = (*_PLACE, *TASKS, "Best of mean", "Δ", "Δ 95 %", "Head", "All heads", "n")
    return Table.described("heads", columns, rows, **where)


def top_heads_table(curves: pd.DataFrame, **where: Any) -> Table:
    """The heads of the first ranks on the mean of the tasks, and their difference, by setting."""
    rows: list[tuple[str, ...]] = []
    top = curves[(curves["task"] == MEAN) & (curves["rank"] <= TOP)].sort_values("rank")
    for setting, here in top.groupby(SETTING, sort=False):
        texts = {backbone: [number(x) for x in here[backbone]] for backbone in BACKBONES}
        texts[GAP] = [interval(_difference(row)) for row in here.to_dict("records")]
        n = str(here["n"].min())
        rows += [(*map(str, setting), side, *text, n) for side, text in texts.items()]
    ranks = sorted(top["rank"].unique())
    columns = (*_PLACE, *(f"rank {rank}" for rank in ranks), "n")
    return Table.described("top_heads", columns, rows, len(SETTING), count=len(ranks), **where)


def selector_table(
    means: pd.DataFrame, cells: pd.DataFrame, accuracy: str = "exact", **where: Any
) -> Table:
    """`selector_means` to read: one row a setting and backbone, and one for their gap.

    cells: rows of `tidy`, for the deviation over trainings or seeds; accuracy: their column.
    """
    rows: list[tuple[str, ...]] = []
    for setting, here in means.groupby(SETTING, sort=False):
        found = {row["name"]: row for row in here.to_dict("records")}
        random = cells[(cells[SETTING] == list(setting)).all(axis=1)]
        random = random[random["selector"] == "random"]
        for side in (*BACKBONES, "gap"):
            row = [*map(str, setting), GAP if side == "gap" else side]
            for kind in (*SELECTORS, "selection"):
                x = found.get(f"{side} {kind}")
                if x is None:
                    row.append("" if (side, kind) == ("gap", "selection") else MISSING)
                elif side == "gap" or kind == "selection":
                    row.append(interval(Estimate(x["value"], x["low"], x["high"])))
                else:
                    mine = random[random["backbone"] == side]
                    std = spread(mine, accuracy).std if kind == "random" else np.nan
                    row.append(plus_minus(x["value"], std))
            rows.append((*row, str(here["n"].min())))
    columns = (*_PLACE, *SELECTORS.values(), "Selection", "n")
    return Table.described("selectors", columns, rows, len(SETTING), **where)


def cost_table(cost: pd.DataFrame) -> Table:
    """What cells cost, by stage and device: `analysis.frame.cost`."""
    rows = [
        (
            *(row.stage, row.device, row.model, str(row.cells), str(row.samples)),
            number(row.seconds, 0),
            number(row.samples / row.seconds) if row.seconds else "",
        )
        for row in cost.itertuples()
    ]
    columns = ("Stage", "Device", "Model", "Cells", "Samples", "Seconds", "Samples/s")
    return Table.described("cost", columns, rows, group=0)


def _difference(row: Any) -> Estimate:
    """RAT+ minus Attention in a row of `rank_curves`."""
    return Estimate(row["difference"], row["difference low"], row["difference high"])


_NONE = ("", "")
