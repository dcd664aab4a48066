"""Cells that the paper's tables and figures need and that are not finished."""

from collections.abc import Iterable, Iterator

import pandas as pd

from ratplus_exp.analysis.frame import BACKBONES, DENSE, SETTING, TASKS, grouped
from ratplus_exp.report.paper import PAPER_TABLES
from ratplus_exp.report.prose import METHODS, setting_name
from ratplus_exp.report.results import Results

SEEDS = 5  # of random selection, in the paper
BUDGETS = ("1/4", "1/8", "1/16")
HITS = {
    "fig2": (["quest"], BUDGETS),
    "fig3": (["snapkv"], BUDGETS),
    "fig4": (["quest", "snapkv"], BUDGETS[-1:]),
}
Setting = tuple[str, int, str, str]  # SETTING and selector


def missing(results: Results, outputs: Iterable[str]) -> list[str]:
    """One sentence for each setting of the outputs (as in stage.outputs) without all its tasks or
    seeds."""
    labels: dict[str, list[str]] = {}
    for output in sorted(outputs, key=lambda name: (name not in PAPER_TABLES, name)):
        label = f"{'Table' if output in PAPER_TABLES else 'Figure'} {output[-1]}"
        frame, what = grouped(results.cells), ""
        if output in HITS:
            frame, what = results.rates, "hit rates of "
        for setting, tasks in _needs(output, results):
            for side, lack in _lacking(frame, setting, tasks):
                lack = f"{side}, {what}{setting_name(*setting)}{lack}"
                labels.setdefault(lack, []).append(label)
    return [f"{lack} ({', '.join(dict.fromkeys(names))})." for lack, names in labels.items()]


def _needs(output: str, results: Results) -> Iterator[tuple[Setting, tuple[str, ...]]]:
    """The settings whose cells an output needs of each backbone, with their tasks."""
    table3 = results.paper("table3")
    blocks = table3[table3["paper_block"].isin([1, 64])].groupby("method")["block_size"].first()
    if output in ("table3", "table4", "table5", "fig1"):
        yield DENSE, TASKS
    if output in PAPER_TABLES:
        paper = results.paper(output)
        tasks = tuple(paper["task"].unique())
        settings = paper.loc[paper["block_size"] > 0, [*SETTING, "selector"]].drop_duplicates()
        yield from ((setting, tasks) for setting in settings.itertuples(index=False, name=None))
    if output == "table5":
        for method in METHODS:
            for selector in ("topk", "oracle"):
                yield (method, blocks[method], "1/4", selector), TASKS
    methods, budgets = HITS.get(output, (list(METHODS), BUDGETS if output == "fig1" else ()))
    for method in methods:
        for budget in budgets:
            yield (method, blocks[method], budget, "topk"), TASKS


def _lacking(
    frame: pd.DataFrame, setting: Setting, tasks: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Each backbone without some of the tasks, or seeds of random selection, and what it lacks."""
    cells = frame[(frame[[*SETTING, "selector"]] == list(setting)).all(axis=1)]
    needed = SEEDS if setting[3] == "random" else 1
    for backbone in BACKBONES:
        seeds = cells[cells["backbone"] == backbone].groupby("task")["selector_seed"].nunique()
        seeds = seeds.reindex(list(tasks), fill_value=0)
        for lacking in (seeds[seeds == 0], seeds[(seeds > 0) & (seeds < needed)]):
            on = f", on {', '.join(lacking.index)}" if len(lacking) < len(tasks) else ""
            if len(lacking):
                few = f": {lacking.min()} of {SEEDS} seeds" if lacking.min() else ""
                yield backbone, few + on
