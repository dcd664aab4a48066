"""The paper's Tables 2-5 with measured numbers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import pandas as pd

from ratplus_exp.analysis.bootstrap import difference
from ratplus_exp.analysis.frame import ALL_TASKS, BACKBONES, SCORERS, select
from ratplus_exp.analysis.spread import DRAW, spread
from ratplus_exp.report.paper import PAPER_TABLES, paper_means, paper_tables
from ratplus_exp.report.prose import (
    MISSING,
    bounds,
    interval,
    number,
    plus_minus,
    span,
    trainings_of,
)
from ratplus_exp.report.table import Table

DENSE = "dense"


def accuracy_table(
    cells: pd.DataFrame,
    samples: pd.DataFrame,
    tier: str,
    paper_table: str,
    scorer: str = "exact",
    first_token: str = "prefill",
    **where: Any,
) -> Table:
    """The paper's layout, settings × backbones × tasks, with measured numbers; dense rows first.

    All the paper's settings appear, their block size scaled to the measured context, and after
    them the measured settings that the paper lacks. Only cells with the paper table's selector
    (top-k or random) count. An accuracy is the mean over trainings and seeds, ± the deviation of
    `spread`. A mean over tasks appears once all of the paper table's are there.

    Args:
        cells, samples: what `tidy` and `sample_scores` return.
        tier: the one tier that the numbers are from.
        paper_table: "table2" to "table5"; the tasks and the paper's columns are from there, too.
        scorer: "exact" or "substring".
        first_token: cells in which an answer's first token came from the dense "prefill", or from
            a "decode" step; methods to which this is all the same always count.
        where: further choices by column of `tidy`, a value or a list: checkpoint=["ab12", "cd34"].

    Raises:
        ValueError: no finished cell fits, or several would share one place in the table.
    """
    if scorer not in SCORERS:
        raise ValueError(f"unknown {scorer!r}: choose one of {', '.join(SCORERS)}")
    paper = paper_means(paper_table)
    tasks = tuple(paper_tables(paper_table)["task"].unique())
    cells = select(cells, {"tier": tier, "backbone": BACKBONES, "task": tasks} | where)
    cells = cells[(cells["method"] == DENSE) | cells["selector"].isin(paper["selector"])]
    cells = cells[cells["first_token"].isna() | (cells["first_token"] == first_token)]
    if cells.empty:
        raise ValueError(f"no finished cells for {paper_table} at tier {tier!r}: evaluate first")
    settings = pd.Series(map(_Setting.of, cells.itertuples()), index=cells.index, dtype=object)
    cells = cells.assign(setting=settings)
    context = _check_unmixed(cells)

    rows: list[tuple[str, ...]] = []
    for setting in _settings(paper, settings, context):
        here = cells[[other == setting for other in settings]]
        printed = setting.in_paper(paper, context)
        mine = samples[samples["cell"].isin(here["cell"])]
        x = difference(mine, scorer, "backbone", ("RAT+", "Attention"), tasks)
        within = MISSING if pd.isna(x.value) else bounds(x)
        gain = (number(x.value, sign="+"), within, number(printed.get("gain"), sign="+"))
        for backbone in BACKBONES:
            side = here[here["backbone"] == backbone]
            draws = side[["training", *DRAW]].drop_duplicates().groupby("training").size()
            rows.append(
                (
                    *setting.label(here, context),
                    number(side["budget_measured"].mean(), digits=3),
                    backbone,
                    *_accuracies(side, scorer, tasks),
                    number(printed.get(backbone)),
                    *(gain if backbone == "RAT+" else ("", "", "")),
                    span(side["n"]),
                    *((str(len(draws)), str(draws.max())) if len(draws) else (MISSING, MISSING)),
                )
            )
    counts = ("n", "trainings", "seeds")
    columns = ("Method", "Block", "k", "Budget", "Kept", "Backbone", *tasks, "Mean")
    columns = (*columns, "Paper", "Δ", "Δ 95 %", "Paper Δ", *counts)
    told = [{row[i] for row in rows} - {MISSING} for i in range(-len(counts), 0)]
    uniform = [name for name, values in zip(counts, told, strict=True) if len(values) == 1]
    return Table.described(
        "accuracy",
        columns,
        rows,
        hide=("Paper", *uniform),  # the caption says what all rows have alike
        table=paper_table[-1],
        of=PAPER_TABLES[paper_table],
        tier=tier,
        scorer=scorer,
        first_token=first_token,
        trainings=trainings_of(cells),
        n=span(cells["n"]),
        n_varies=cells["n"].nunique() > 1,
        context=context,
        seeds=sorted(cells["seed"].unique()),
        draws=sorted(cells[cells["selector"] == "random"]["selector_seed"].unique()),
        several=cells.groupby(["backbone", "training", "setting", "task"])["cell"].size().max() > 1,
        models=_of_each(cells, "model"),
        checkpoints=_of_each(cells, "checkpoint"),
        memory=_of_each(cells, "effective_memory_length"),
    )


def tasks_table(
    cells: pd.DataFrame, samples: pd.DataFrame, scorer: str = "exact", **where: Any
) -> Table:
    """All that was measured under top-k: protocols × settings × backbones × tasks, dense first.

    A method that selects nothing after the prompt has one protocol. Arguments as in
    `accuracy_table`; cells may be of both protocols. ValueError if nothing was measured.
    """
    cells = cells[(cells["method"] == DENSE) | (cells["selector"] == "topk")]
    if cells.empty:
        raise ValueError("no finished cells for the table of tasks: evaluate first")
    settings = pd.Series(map(_Setting.of, cells.itertuples()), index=cells.index, dtype=object)
    split = cells["first_token"].map({"split": "split"}).fillna("whole")
    split = split.mask(cells["first_token"].isna(), "either")
    cells = cells.assign(setting=settings, protocol=split)
    for _, group in cells.groupby("protocol"):
        context = _check_unmixed(group)
    tasks = tuple(task for task in ALL_TASKS if task in set(cells["task"]))
    order = sorted(
        set(cells[["setting", "protocol"]].itertuples(index=False, name=None)),
        key=lambda x: (x[0].method != DENSE, x[0].method, x[0].block_size, -Fraction(x[0].budget),
                       x[1] == "split"),
    )  # fmt: skip
    rows = []
    for setting, protocol in order:
        here = cells[cells["protocol"] == protocol]
        here = here[[other == setting for other in here["setting"]]]
        mine = samples[samples["cell"].isin(here["cell"])]
        x = difference(mine, scorer, "backbone", ("RAT+", "Attention"), tasks)
        for backbone in BACKBONES:
            side = here[here["backbone"] == backbone]
            method, block, _, budget = setting.label(here, context)
            rows.append(
                (
                    *(method, block, budget, protocol),
                    number(side["budget_measured"].mean(), digits=3),
                    backbone,
                    *_accuracies(side, scorer, tasks),
                    interval(x) if backbone == "RAT+" else "",
                    span(side["n"]),
                )
            )
    place = ("Method", "Block", "Budget", "Protocol")
    columns = (*place, "Kept", "Backbone", *tasks, "Mean", "Δ", "n")
    where |= {"scorer": scorer, "context": context, "trainings": trainings_of(cells)}
    return Table.described("tasks", columns, rows, len(place), **where)


class _Setting(NamedTuple):
    """What the rows of both backbones share."""

    method: str
    block_size: int  # tokens; 1 where single tokens are selected, 0 for dense attention
    budget: str

    @classmethod
    def of(cls, cell: Any) -> _Setting:
        """The setting of one row of `tidy`."""
        if cell.method == DENSE:
            return cls(DENSE, 0, "1")
        return cls(cell.method, 1 if pd.isna(cell.block_size) else cell.block_size, cell.budget)

    def top_k(self, context: int) -> Fraction:
        """Blocks or tokens that the budget buys."""
        return Fraction(self.budget) * context / self.block_size

    def label(self, cells: pd.DataFrame, context: int) -> tuple[str, str, str, str]:
        """Method, block size, k (as stored, if the setting was measured) and budget."""
        if self.method == DENSE:
            return DENSE, "", "", self.budget
        stored = cells["top_k"].dropna()
        top_k = stored.iloc[0] if len(stored) else self.top_k(context)
        return self.method, str(self.block_size), str(top_k), self.budget

    def in_paper(self, paper: pd.DataFrame, context: int) -> dict[str, Any]:
        """The paper's row for this method and budget; of two block sizes, the one with our k."""
        same = paper[(paper["method"] == self.method) & (paper["budget"] == self.budget)]
        if len(same) > 1:
            same = same[same["top_k"] == self.top_k(context)]
        return {} if same.empty else same.iloc[0].to_dict()


def _settings(paper: pd.DataFrame, measured: pd.Series, context: int) -> list[_Setting]:
    """Dense, the paper's settings with as many blocks a context as there, then all others."""
    found = [_Setting(DENSE, 0, "1")]
    for row in paper.itertuples():
        # One block size a k: budget = k · block / context.
        block = Fraction(row.budget) * context / row.top_k if row.block_size > 1 else Fraction(1)
        if block.denominator == 1:
            found.append(_Setting(row.method, int(block), row.budget))
    extra = sorted(set(measured), key=lambda s: (s.method, s.block_size, -Fraction(s.budget)))
    return list(dict.fromkeys([*found, *extra]))


def _accuracies(side: pd.DataFrame, scorer: str, tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Each task, then the mean over tasks."""
    groups = dict(iter(side.groupby("task")))
    cells = [
        plus_minus(*spread(groups[task], scorer)[:2]) if task in groups else MISSING
        for task in tasks
    ]
    return (*cells, MISSING if MISSING in cells else plus_minus(*spread(side, scorer)[:2]))


def _check_unmixed(cells: pd.DataFrame) -> int:
    """The one context length; raises if cells of unlike origin would share a row or a place."""
    origin = ["backbone", "training", *DRAW]
    scopes = {
        "context_length": ["tier"],
        "model": origin,
        "checkpoint": origin,
        "variant": ["setting", "task"],
        "cell": [*origin, "setting", "task"],
        "training": ["backbone", "checkpoint"],
    }
    for column, scope in scopes.items():
        for _, group in cells.groupby(scope, dropna=False):
            found = sorted(map(str, group[column].unique()))
            if len(found) > 1:
                first = group.iloc[0]
                who = f"{first['backbone']} {first['method']}, seed {first['seed']}"
                raise ValueError(
                    f"the table would mix results of several {column}s ({', '.join(found)}; {who}):"
                    f" choose which, e.g. where {column}=[{found[0]!r}, …], one for each backbone"
                )
    return int(cells["context_length"].iloc[0])


def _of_each(cells: pd.DataFrame, column: str) -> str:
    """What each backbone has in a column: the mean of numbers, or all other values."""
    texts = []
    for backbone in BACKBONES:
        values = cells.loc[cells["backbone"] == backbone, column].dropna()
        names = ", ".join(sorted(map(str, values.unique()))) or MISSING
        texts.append(f"{backbone} {number(values.mean()) if values.dtype == float else names}")
    return ", ".join(texts)
