"""The parts of a report: each table and figure of P1 from the cells of one pair of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from ratplus_exp.results import compare, figures, hits, sanity, selection
from ratplus_exp.results.against import against_paper, against_paper_table
from ratplus_exp.results.labels import METHODS, first_token_note, measured_at
from ratplus_exp.results.layout import Table, number
from ratplus_exp.results.page import Picture, Section
from ratplus_exp.results.paper import TASKS
from ratplus_exp.results.store import Store
from ratplus_exp.results.tables import PAPER_TABLES, SCORERS, accuracy_table


@dataclass(frozen=True)
class Evidence:
    """Finished cells of one pair of models, at one tier and context length.

    cells, samples: from `tidy` and `sample_scores`; rates: from `hit_rates`.
    """

    store: Store
    cells: pd.DataFrame
    samples: pd.DataFrame
    rates: pd.DataFrame
    tier: str
    scorer: str
    first_token: str
    folder: Path

    @property
    def accuracy(self) -> str:
        return SCORERS[self.scorer][0]

    @property
    def score(self) -> str:
        return SCORERS[self.scorer][1]

    @cached_property
    def curves(self) -> pd.DataFrame:
        return hits.rank_curves(self.store, self.rates)

    @cached_property
    def selector_means(self) -> pd.DataFrame:
        return selection.selector_means(self.samples, self.score)

    @cached_property
    def patterns(self) -> list[compare.Pattern]:
        """Of every table of P1 that has a measured cell."""
        found = [
            pattern
            for table in PAPER_TABLES
            for pattern in compare.patterns(table, self.samples, self.score)
        ]
        measured = {pattern.table for pattern in found if pattern.measured}
        return [pattern for pattern in found if pattern.table in measured]

    def titled(self, what: str) -> str:
        context = self.cells["context_length"] if len(self.cells) else self.rates["context_length"]
        where = measured_at(self.tier, self.first_token)
        return f"{what}; {where}, {context.iloc[0]} tokens"


def section(evidence: Evidence, output: str, brief: bool = False) -> Section:
    """A table (table2 … table5) or figure (fig1 … fig4), whose files are written on the way.

    brief: a table without its columns of tasks.

    Raises:
        ValueError: nothing of it was measured, or the output is unknown.
    """
    if output in PAPER_TABLES:
        return _table(evidence, output, brief)
    if output not in _FIGURES:
        known = ", ".join((*PAPER_TABLES, *_FIGURES))
        raise ValueError(f"stage.outputs has the unknown {output!r}: use some of {known}, report")
    return _FIGURES[output](evidence, output)


def _table(evidence: Evidence, name: str, brief: bool) -> Section:
    tier, first = evidence.tier, evidence.first_token
    table = accuracy_table(
        (evidence.cells, evidence.samples), tier, name, evidence.scorer, first_token=first
    )
    frame = against_paper(name, evidence.cells, evidence.accuracy)
    table.write(evidence.folder, name)
    against_paper_table(frame, name, tier, first).write(evidence.folder, f"{name}_against_paper")
    words = [_TABLE_WORDS[name]]
    if brief:
        words.append(f"Its measured cells are Table 3's; task by task they are in {name}.md, too.")
        table = table.without(TASKS)
    words.append(f"Accuracy by accuracy beside the paper's: {name}_against_paper.md, .csv, .tex.")
    tables, pictures = [table], []
    caption = f"Seeds and n as below. {first_token_note(first)}"
    if name in ("table3", "table4"):
        title = f"RAT+ minus Attention: P1's Table {name[-1]} and {measured_at(tier, first)}"
        pictures = figures.gains(frame, evidence.folder, f"{name}_gains", title)
        caption = f"A point a setting and task; filled: P1's decisive cells. {caption}"
    if name == "table5" and len(evidence.selector_means):
        extra = selection.selector_table(
            evidence.selector_means, evidence.cells, tier, evidence.accuracy, first
        )
        extra.write(evidence.folder, "selectors")
        tables.append(extra)
        title = evidence.titled("Who selects: mean accuracy over the tasks")
        pictures = figures.selectors(evidence.selector_means, evidence.folder, "selectors", title)
        caption = f"Whiskers: 95 % bootstrap intervals over samples. {caption}"
    shown = tuple(Picture(path, caption) for path in pictures[:1])
    return Section(f"Table {name[-1]}", tuple(words), tables=tuple(tables), pictures=shown)


def _fig1(evidence: Evidence, name: str) -> Section:
    title = evidence.titled("Mean accuracy over the tasks (dashed: dense)")
    cells = evidence.cells[evidence.cells["selector"] == "topk"]
    pictures = figures.accuracy_by_budget(
        evidence.samples, evidence.score, evidence.folder, name, title
    )
    words = (
        "Mean accuracy of both backbones against the budget, the share of the context that is "
        "looked at. Whiskers are 95 % bootstrap intervals over samples."
    )
    return _figure(evidence, name, words, pictures, cells)


def _ranked(method: str) -> Callable[[Evidence, str], Section]:
    def build(evidence: Evidence, name: str) -> Section:
        title = evidence.titled(f"H1, {METHODS[method]}: heads by hit rate, mean of the tasks")
        pictures = figures.ranked_heads(evidence.curves, method, evidence.folder, name, title)
        words = (
            f"H1 for {METHODS[method]}: how often the candidates that a head selected hold "
            "the golden answer position at every decoding step. Heads from best to worst, which is "
            "done anew in every resampling; bands are 95 % bootstrap intervals over samples."
        )
        rates = evidence.rates[evidence.rates["method"] == method]
        found = _figure(evidence, name, words, pictures, rates)
        return _with_heads(evidence, found, method, name)

    return build


def _with_heads(evidence: Evidence, found: Section, method: str, name: str) -> Section:
    curves, rates = (
        frame[frame["method"] == method] for frame in (evidence.curves, evidence.rates)
    )
    tables = (
        hits.hits_table(curves, rates, evidence.tier, evidence.first_token),
        hits.top_heads_table(curves, evidence.tier, evidence.first_token),
    )
    for table, what in zip(tables, ("heads", "top_heads"), strict=True):
        table.write(evidence.folder, f"{name}_{what}")
    curves.to_csv(evidence.folder / f"{name}_ranks.csv", index=False)
    hits.ranked_heads(rates).to_csv(evidence.folder / f"{name}_ranked_heads.csv", index=False)
    return replace(found, tables=tables)


def _fig4(evidence: Evidence, name: str) -> Section:
    budgets = figures.by_size(evidence.curves)
    title = evidence.titled("H1, hit rate of the best head by task")
    pictures = []
    if budgets:
        title += f", budget {budgets[-1]}"
        pictures = figures.heads_by_task(evidence.curves, budgets[-1], evidence.folder, name, title)
    words = "H1 task by task: for each task the head that is best there, at the smallest budget."
    return _figure(evidence, name, words, pictures, evidence.rates)


def _figure(
    evidence: Evidence, name: str, words: str, pictures: list[Path], cells: pd.DataFrame
) -> Section:
    if not pictures:
        raise ValueError(f"no finished cells for {name}: run make {name}")
    low, high = cells["n"].min(), cells["n"].max()
    seeds = ", ".join(map(str, sorted(cells["seed"].unique())))
    caption = (
        f"n = {low if low == high else f'{low}–{high}'} samples a task, seeds {seeds}. "
        f"{first_token_note(evidence.first_token)}"
    )
    shown = tuple(Picture(path, caption) for path in pictures[:1])
    return Section(f"Figure {name[-1]}", (words,), pictures=shown)


_FIGURES: dict[str, Callable[[Evidence, str], Section]] = {
    "fig1": _fig1,
    "fig2": _ranked("quest"),
    "fig3": _ranked("snapkv"),
    "fig4": _fig4,
}
_TABLE_WORDS = {
    "table2": (
        "H2, as in P1's Table 2, where Quest and MoBA choose their blocks at random; SnapKV's rows "
        "and dense attention's are this project's."
    ),
    "table3": "P1's main table: the three methods at several budgets and block sizes.",
    "table4": "The settings of Table 3 beside P1's Table 4, whose models are OLMo2-7B.",
    "table5": (
        "H2, as in P1's Table 5: random selection on all tasks, five seeds. Below it the other end "
        "of the scale: an oracle that always selects what holds the answer."
    ),
}


def pattern_section(evidence: Evidence) -> Section:
    """Paper against measured; its files are written on the way."""
    table = compare.pattern_table(evidence.patterns, evidence.tier, evidence.first_token)
    table.write(evidence.folder, "pattern")
    words = (
        "Models of another size can't have the paper's levels, but they can have its pattern: "
        "which backbone is ahead where it matters, and which settings are hard."
    )
    return Section("Paper against measured", (words,), tables=(table,))


def warning_section(evidence: Evidence) -> Section:
    points = sanity.warnings(evidence.store, evidence.samples, evidence.score)
    words = (
        "Checked: sparse attention better than dense beyond noise; a smaller budget better than a "
        "larger one beyond noise, on the mean of the tasks; prompts that were cut."
    )
    return Section("Warnings", (words,), tuple(points) or ("None.",))


def cost_table(store: Store, cells: set[str]) -> Table:
    """What the cells cost, by stage and device."""
    rows: dict[tuple[str, str, str], list[float]] = {}
    for cell in store.cells():
        if cell.id in cells:
            run = cell.provenance()[-1]
            place = (cell.key["stage"], run.get("device", ""), cell.key["model"])
            total = rows.setdefault(place, [0, 0, 0.0])
            metrics = cell.metrics()
            total[0] += 1
            total[1] += metrics["n"]
            total[2] += metrics.get("seconds", 0.0)
    return Table(
        title="Cost",
        caption="Process seconds spent on batches, summed over cells; loading is not counted.",
        columns=("Stage", "Device", "Model", "Cells", "Samples", "Seconds", "Samples/s"),
        rows=tuple(
            (*place, str(n), str(samples), number(s, 0), number(samples / s) if s else "")
            for place, (n, samples, s) in sorted(rows.items())
        ),
    )
