"""P1's Tables 2-5 with measured numbers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import pandas as pd

from ratplus_exp.results.compare import gain
from ratplus_exp.results.frame import sample_scores, select, tidy
from ratplus_exp.results.labels import first_token_note, measured_at, scale_note
from ratplus_exp.results.layout import MISSING, Table, number
from ratplus_exp.results.paper import BACKBONES, paper_means, paper_tables
from ratplus_exp.results.stats import mean_std
from ratplus_exp.results.store import Store

DENSE = "dense"
DRAW = ("seed", "selector_seed")  # what an accuracy's mean and deviation are taken over
SCORERS = {  # scorer: columns of `tidy` and of `sample_scores`, words for the caption
    "p2": ("accuracy", "score_p2", "P2's score (overlap of the comma-separated values)"),
    "ruler": ("accuracy_ruler", "score_ruler", "RULER's score (gold values found as substrings)"),
}
PAPER_TABLES = {  # words for the caption
    "table2": "random selection, OLMo2-7B (inferred)",
    "table3": "P2's 7B models",
    "table4": "OLMo2-7B",
    "table5": "random selection, OLMo2-7B (inferred)",
}
Source = Store | tuple[pd.DataFrame, pd.DataFrame]


def table3(source: Source, tier: str, scorer: str = "p2", **options: Any) -> Table:
    """P1's Table 3: see `accuracy_table`."""
    return accuracy_table(source, tier, "table3", scorer, **options)


def accuracy_table(
    source: Source,
    tier: str,
    paper_table: str,
    scorer: str = "p2",
    first_token: str = "prefill",
    **where: Any,
) -> Table:
    """P1's layout, settings × backbones × tasks, with measured numbers; dense rows first.

    All the paper's settings appear, their block size scaled to the measured context, and after
    them the measured settings that the paper lacks. Only cells with the paper table's selector
    (top-k or random) count. An accuracy is the mean over seeds, ± their standard deviation if
    there are several. A mean over tasks appears once all of the paper table's are there.

    Args:
        source: a store, or what `tidy` and `sample_scores` return.
        tier: the one tier that the numbers are from.
        paper_table: "table2" to "table5"; the tasks and the P1 columns are from there, too.
        scorer: "p2" or "ruler".
        first_token: cells in which an answer's first token came from the dense "prefill", or from
            a "decode" step; methods to which this is all the same always count.
        where: further choices by column of `tidy`, a value or a list: checkpoint=["ab12", "cd34"].

    Raises:
        ValueError: no finished cell fits, or several would share one place in the table.
    """
    for name, known in ((scorer, SCORERS), (paper_table, PAPER_TABLES)):
        if name not in known:
            raise ValueError(f"unknown {name!r}: choose one of {', '.join(known)}")
    accuracy, score, _ = SCORERS[scorer]
    paper = paper_means(paper_table)
    tasks = tuple(paper_tables().query("table == @paper_table")["task"].unique())
    cells, samples = (tidy(source), sample_scores(source)) if isinstance(source, Store) else source
    cells = select(cells, {"tier": tier, "backbone": BACKBONES, "task": tasks} | where)
    cells = cells[(cells["method"] == DENSE) | cells["selector"].isin(paper["selector"])]
    cells = cells[cells["first_token"].isna() | (cells["first_token"] == first_token)]
    if cells.empty:
        raise ValueError(f"no finished cells for {paper_table} at tier {tier!r}: evaluate first")
    settings = pd.Series(map(_Setting.of, cells.itertuples()), index=cells.index, dtype=object)
    cells = cells.assign(setting=settings)
    context = _check_unmixed(cells)

    labels = ("Method", "Block", "k", "Budget", "Kept", "Backbone")
    columns = (*labels, *tasks, "Mean", "P1", "Δ", "Δ 95 %", "P1 Δ", "n", "seeds")
    rows: list[tuple[str, ...]] = []
    breaks = set()
    for setting in _settings(paper, settings, context):
        here = cells[[other == setting for other in settings]]
        sides = {backbone: here[here["backbone"] == backbone] for backbone in BACKBONES}
        printed = setting.in_paper(paper, context)
        x = gain(samples[samples["cell"].isin(here["cell"])], score, tasks)
        difference = (MISSING, MISSING)
        if not pd.isna(x.value):
            difference = number(x.value, sign="+"), f"[{number(x.low)}, {number(x.high)}]"
        of_both = (*difference, number(printed.get("gain"), sign="+"))
        if rows and rows[-1][0] != setting.method:
            breaks.add(len(rows))
        for backbone, side in sides.items():
            rows.append(
                setting.label(here, context)
                + (number(side["budget_measured"].mean(), digits=3), backbone)
                + _accuracies(side.pivot(index=list(DRAW), columns="task", values=accuracy), tasks)
                + (number(printed.get(backbone)),)
                + (of_both if backbone == "RAT+" else ("", "", ""))
                + (_span(side["n"]), str(len(side[list(DRAW)].drop_duplicates()) or MISSING))
            )
    values = {name: {row[i] for row in rows} - {MISSING} for i, name in enumerate(columns)}
    uniform = {name for name in ("n", "seeds") if len(values[name]) == 1}  # the caption says it
    return Table(
        title=f"P1's Table {paper_table[-1]}, measured at {measured_at(tier, first_token)}",
        caption=_caption(cells, tier, paper_table, scorer, first_token),
        columns=columns,
        rows=tuple(rows),
        breaks=frozenset(breaks),
        text_hides=frozenset({"P1", *uniform}),
    )


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
        """P1's row for this method and budget; where P1 has two block sizes, the one with our k."""
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


def _accuracies(percent: pd.DataFrame, tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Each task, then the mean over tasks; from a frame of seeds × tasks."""
    percent = percent.reindex(columns=list(tasks))
    cells = [_spread(percent[task].dropna()) for task in tasks]
    if MISSING in cells:
        return (*cells, MISSING)
    whole = percent.dropna().mean(axis=1)  # seeds that have all tasks
    return (*cells, _spread(whole) if len(whole) else number(percent.mean().mean()))


def _check_unmixed(cells: pd.DataFrame) -> int:
    """The one context length; raises if cells of unlike origin would share a row or a place."""
    origin = ["backbone", *DRAW]
    place = [*origin, "setting", "task"]
    scopes = {
        "context_length": ["tier"],
        "model": origin,
        "checkpoint": origin,
        "variant": ["setting"],
        "cell": place,
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


def _caption(
    cells: pd.DataFrame, tier: str, paper_table: str, scorer: str, first_token: str
) -> str:
    def of_each(column: str) -> str:
        texts = []
        for backbone in BACKBONES:
            values = cells.loc[cells["backbone"] == backbone, column].dropna()
            if values.dtype == float:
                text = number(values.mean())
            else:
                text = ", ".join(sorted(map(str, values.unique()))) or MISSING
            texts.append(f"{backbone} {text}")
        return ", ".join(texts)

    def listed(values: pd.Series) -> str:
        return ", ".join(map(str, sorted(values.unique())))

    draws = cells[cells["selector"] == "random"]["selector_seed"]
    seeds = f"seeds {listed(cells['seed'])} of the samples"
    seeds += f" and {listed(draws)} of random selection" if len(draws) else ""
    if cells.groupby(["backbone", "setting", "task"])["cell"].size().max() > 1:
        seeds += "; ± is the standard deviation over them (how many: column seeds)"
    n = f"n = {_span(cells['n'])} per task and seed"
    n += "" if cells["n"].nunique() == 1 else ", which of them is in column n"
    return (
        f"Accuracy in % by {SCORERS[scorer][2]}. Tier {tier}{scale_note(tier)}; "
        f"context {_span(cells['context_length'])} tokens; {n}; "
        f"{seeds}. {first_token_note(first_token)} "
        f"Models: {of_each('model')}; checkpoints: {of_each('checkpoint')}. "
        f"Effective memory length in tokens: {of_each('effective_memory_length')}. "
        "Kept: fraction of the KV entries that was attended or stored. Δ: mean of RAT+ minus mean "
        "of Attention in points, with a 95 % bootstrap interval over samples, paired by id and "
        f"stratified by task. P1 and P1 Δ: the same means and difference in P1's Table "
        f"{paper_table[-1]} ({PAPER_TABLES[paper_table]}, 4096 tokens, n = 500). "
        f"{MISSING}: not measured, or not in P1."
    )


def _spread(values: pd.Series) -> str:
    if values.empty:
        return MISSING
    mean, std = mean_std(values)
    return number(mean) if pd.isna(std) else f"{number(mean)}±{number(std)}"


def _span(values: pd.Series) -> str:
    if values.empty:
        return MISSING
    low, high = values.min(), values.max()
    return str(low) if low == high else f"{low}–{high}"
