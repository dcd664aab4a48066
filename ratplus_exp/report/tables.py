"""All other tables: the pattern, the paper cell by cell, heads, selectors, cost."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ratplus_exp.analysis.bootstrap import mean_std
from ratplus_exp.analysis.frame import BACKBONES, SETTING, TASKS, select
from ratplus_exp.analysis.hits import MEAN, TOP, ranked_heads
from ratplus_exp.analysis.pattern import DECISIVE, FEWEST, Pattern
from ratplus_exp.analysis.spread import spread
from ratplus_exp.report.prose import (
    MISSING,
    SELECTORS,
    bounds,
    interval,
    number,
    plus_minus,
    say,
    trainings_of,
)
from ratplus_exp.report.table import Table, breaks

GAP = "RAT+ − Attention"


def pattern_table(
    found: Sequence[Pattern], trainings: Sequence[int], tier: str, first_token: str = "prefill"
) -> Table:
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
    where = {"tier": tier, "first_token": first_token}
    return Table(
        title=say("pattern_title", **where),
        caption=say(
            "pattern", decisive=f"{DECISIVE:g}", fewest=FEWEST, trainings=trainings, **where
        ),
        columns=(
            *("Of paper", "Methods", "Decisive", "Measured", "agree", "against", "tied"),
            *("Agreement, %", "Settings", "ρ of gain", "ρ of Attention", "ρ of RAT+"),
        ),
        rows=tuple(rows),
        breaks=breaks(rows),
    )


def against_table(
    frame: pd.DataFrame,
    paper_table: str,
    trainings: Sequence[int],
    tier: str,
    first_token: str = "prefill",
) -> Table:
    """`cell_by_cell` as a table to read."""
    numbers = {"paper": 1, "paper std": 2, "measured": 1, "measured std": 2, "difference": 1}
    setting = ("method", "block_size", "top_k", "budget", "selector", "backbone", "task")
    rows = [
        (
            *(str(row[name]) for name in setting),
            *(number(row[name], digits) for name, digits in numbers.items()),
            *(MISSING if pd.isna(row[name]) else str(row[name]) for name in _COUNTS),
            number(row["budget_measured"], 3),
        )
        for row in frame.to_dict("records")
    ]
    where = {"tier": tier, "first_token": first_token}
    return Table(
        title=say("against_title", table=paper_table[-1], **where),
        caption=say("against", trainings=trainings, **where),
        columns=(
            *("Method", "Paper block", "Paper k", "Budget", "Selector", "Backbone", "Task"),
            *("Paper", "Paper std", "measured", "std", "difference", *_COUNTS, "Kept"),
        ),
        rows=tuple(rows),
    )


def heads_table(
    curves: pd.DataFrame, rates: pd.DataFrame, tier: str, first_token: str = "prefill"
) -> Table:
    """The best head, and the mean of all heads, of both backbones: setting × (tasks and mean).

    curves: from `rank_curves`; rates: the rows of `hit_rates` that it was made from.
    """
    ranked = ranked_heads(rates)
    rows: list[tuple[str, ...]] = []
    for setting, here in curves[curves["rank"] == 1].groupby(SETTING, sort=False):
        by_task = here.set_index("task")
        mean = by_task.loc[MEAN]
        for backbone in BACKBONES:
            place = dict(zip(SETTING, setting, strict=True)) | {"backbone": backbone}
            mine = select(ranked, place)
            best = mine[mine["rank"] == 1].sort_values("training")
            gap = ("", "")
            if backbone == "RAT+":
                bound = {end: mean[f"difference {end}"] for end in ("low", "high")}
                gap = number(mean["difference"], sign="+"), bounds(bound)
            std = mean_std(best["hit_rate"])[1]
            rows.append(
                (
                    *map(str, setting),
                    backbone,
                    *(
                        number(by_task.loc[task, backbone]) if task in by_task.index else MISSING
                        for task in TASKS
                    ),
                    plus_minus(mean[backbone], std),
                    *gap,
                    ", ".join(f"{head.layer}.{head.head}" for head in best.itertuples()),
                    number(mine["hit_rate"].mean()),
                    str(mean["n"]),
                )
            )
    return Table(
        title=say("heads_title", tier=tier, first_token=first_token),
        caption=say("heads", first_token=first_token, trainings=trainings_of(rates)),
        columns=(
            *("Method", "Block", "Budget", "Backbone", *TASKS, "Best of mean", "Δ", "Δ 95 %"),
            *("Head", "All heads", "n"),
        ),
        rows=tuple(rows),
        breaks=breaks(rows),
    )


def top_heads_table(
    curves: pd.DataFrame, trainings: Sequence[int], tier: str, first_token: str = "prefill"
) -> Table:
    """The heads of the first ranks on the mean of the tasks, and their difference, by setting."""
    rows: list[tuple[str, ...]] = []
    top = curves[(curves["task"] == MEAN) & (curves["rank"] <= TOP)]
    ranks = sorted(top["rank"].unique())
    for setting, here in top.groupby(SETTING, sort=False):
        by_rank = here.set_index("rank")
        texts = {b: [number(by_rank.loc[rank, b]) for rank in ranks] for b in BACKBONES}
        values = (by_rank.loc[rank, ["difference", *_GAP_BOUNDS]].to_list() for rank in ranks)
        texts[GAP] = [
            f"{number(x, sign='+')} {bounds({'low': low, 'high': high})}" for x, low, high in values
        ]
        n = str(here["n"].min())
        rows += [(*map(str, setting), side, *text, n) for side, text in texts.items()]
    where = {"tier": tier, "first_token": first_token}
    return Table(
        title=say("top_heads_title", count=len(ranks), **where),
        caption=say("top_heads", first_token=first_token, trainings=trainings),
        columns=("Method", "Block", "Budget", "Backbone", *(f"rank {r}" for r in ranks), "n"),
        rows=tuple(rows),
        breaks=breaks(rows, len(SETTING)),
    )


def selector_table(
    means: pd.DataFrame,
    cells: pd.DataFrame,
    tier: str,
    accuracy: str = "exact",
    first_token: str = "prefill",
) -> Table:
    """`selector_means` to read: one row a setting and backbone, and one for their gap.

    cells: rows of `tidy`, for the deviation over trainings or seeds; accuracy: their column.
    """
    rows: list[tuple[str, ...]] = []
    for setting, here in means.groupby(SETTING, sort=False):
        found = here.set_index("name")
        random = cells[(cells[SETTING] == list(setting)).all(axis=1)]
        random = random[random["selector"] == "random"]
        for side in (*BACKBONES, "gap"):
            row = [*map(str, setting), {"gap": GAP}.get(side, side)]
            for kind in (*SELECTORS, "selection"):
                name = f"{side} {kind}"
                if name not in found.index:
                    row.append("" if (side, kind) == ("gap", "selection") else MISSING)
                    continue
                x = found.loc[name]
                if side == "gap" or kind == "selection":
                    row.append(f"{number(x['value'], sign='+')} {bounds(x)}")
                else:
                    mine = random[random["backbone"] == side]
                    std = spread(mine, accuracy).std if kind == "random" else float("nan")
                    row.append(plus_minus(x["value"], std))
            rows.append((*row, str(found["n"].min())))
    return Table(
        title=say("selectors_title", tier=tier, first_token=first_token),
        caption=say("selectors", first_token=first_token, trainings=trainings_of(cells)),
        columns=(
            *("Method", "Block", "Budget", "Backbone"),
            *(*SELECTORS.values(), "Selection", "n"),
        ),
        rows=tuple(rows),
        breaks=breaks(rows, len(SETTING)),
    )


def cost_table(cost: pd.DataFrame) -> Table:
    """What cells cost, by stage and device: `analysis.frame.cost`."""
    rows = tuple(
        (
            *(row.stage, row.device, row.model, str(row.cells), str(row.samples)),
            number(row.seconds, 0),
            number(row.samples / row.seconds) if row.seconds else "",
        )
        for row in cost.itertuples()
    )
    caption = "Process seconds spent on batches, summed over cells; loading is not counted."
    columns = ("Stage", "Device", "Model", "Cells", "Samples", "Seconds", "Samples/s")
    return Table("Cost", caption, columns, rows)


_COUNTS = ("n", "trainings", "seeds")
_GAP_BOUNDS = ["difference low", "difference high"]
