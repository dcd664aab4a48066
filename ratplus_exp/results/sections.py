"""The parts of a report: each table and figure of P1 from the cells of one pair of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from ratplus_exp.results import compare, figures, hits, sanity, selection
from ratplus_exp.results.layout import Table, number
from ratplus_exp.results.page import Section
from ratplus_exp.results.paper import BACKBONES
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
        return f"{what}; tier {self.tier}, {context.iloc[0]} tokens"


def section(evidence: Evidence, output: str) -> Section:
    """A table (table2 … table5) or figure (fig1 … fig4), whose files are written on the way.

    Raises:
        ValueError: nothing of it was measured, or the output is unknown.
    """
    if output in PAPER_TABLES:
        return _table(evidence, output)
    if output not in _FIGURES:
        known = ", ".join((*PAPER_TABLES, *_FIGURES))
        raise ValueError(f"stage.outputs has the unknown {output!r}: use some of {known}, report")
    return _FIGURES[output](evidence, output)


def _table(evidence: Evidence, name: str) -> Section:
    table = accuracy_table(
        (evidence.cells, evidence.samples),
        evidence.tier,
        name,
        evidence.scorer,
        first_token=evidence.first_token,
    )
    frame = compare.against_paper(name, evidence.cells, evidence.accuracy)
    table.write(evidence.folder, name)
    compare.against_paper_table(frame, name, evidence.tier).write(
        evidence.folder, f"{name}_against_paper"
    )
    words = [_TABLE_WORDS[name]]
    words.append(f"Accuracy by accuracy beside the paper's: {name}_against_paper.md, .csv, .tex.")
    tables, pictures = [table], []
    if name in ("table3", "table4"):
        title = f"RAT+ minus Attention: P1's Table {name[-1]} and tier {evidence.tier}"
        pictures = figures.gains(frame, evidence.folder, f"{name}_gains", title)
    if name == "table5" and len(evidence.selector_means):
        extra = selection.selector_table(evidence.selector_means, evidence.cells, evidence.tier)
        extra.write(evidence.folder, "selectors")
        tables.append(extra)
        title = evidence.titled("Who selects: mean accuracy over the tasks")
        pictures = figures.selectors(evidence.selector_means, evidence.folder, "selectors", title)
    return Section(
        f"Table {name[-1]}", tuple(words), tables=tuple(tables), pictures=tuple(pictures[:1])
    )


def _fig1(evidence: Evidence, name: str) -> Section:
    title = evidence.titled("Mean accuracy over the tasks (dotted: dense)")
    pictures = figures.accuracy_by_budget(evidence.cells, evidence.folder, name, title)
    return _figure(name, "Mean accuracy of both backbones against the budget.", pictures)


def _ranked(method: str) -> Callable[[Evidence, str], Section]:
    def build(evidence: Evidence, name: str) -> Section:
        title = evidence.titled(
            f"H1, {figures.NAMES[method]}: heads by hit rate, mean of the tasks"
        )
        pictures = figures.ranked_heads(evidence.curves, method, evidence.folder, name, title)
        words = (
            f"H1 for {figures.NAMES[method]}: how often the candidates that a head selected hold "
            "the golden answer position at every decoding step. Heads from best to worst, which is "
            "done anew in every resampling; bands are 95 % bootstrap intervals over samples."
        )
        return _with_heads(evidence, _figure(name, words, pictures), method, name)

    return build


def _with_heads(evidence: Evidence, found: Section, method: str, name: str) -> Section:
    curves, rates = (
        frame[frame["method"] == method] for frame in (evidence.curves, evidence.rates)
    )
    table = hits.hits_table(curves, rates, evidence.tier)
    table.write(evidence.folder, f"{name}_heads")
    curves.to_csv(evidence.folder / f"{name}_ranks.csv", index=False)
    hits.ranked_heads(rates).to_csv(evidence.folder / f"{name}_ranked_heads.csv", index=False)
    return Section(found.title, found.words, tables=(table,), pictures=found.pictures)


def _fig4(evidence: Evidence, name: str) -> Section:
    budgets = figures.by_size(evidence.curves)
    title = evidence.titled("H1, hit rate of the best head by task")
    pictures = []
    if budgets:
        title += f", budget {budgets[-1]}"
        pictures = figures.heads_by_task(evidence.curves, budgets[-1], evidence.folder, name, title)
    words = "H1 task by task: for each task the head that is best there, at the smallest budget."
    return _figure(name, words, pictures)


def _figure(name: str, words: str, pictures: list[Path]) -> Section:
    if not pictures:
        raise ValueError(f"no finished cells for {name}: run make {name}")
    return Section(f"Figure {name[-1]}", (words,), pictures=tuple(pictures[:1]))


_FIGURES: dict[str, Callable[[Evidence, str], Section]] = {
    "fig1": _fig1,
    "fig2": _ranked("quest"),
    "fig3": _ranked("snapkv"),
    "fig4": _fig4,
}
_TABLE_WORDS = {
    "table2": "H2, as in P1's Table 2: Quest and MoBA choose their blocks at random.",
    "table3": "P1's main table: the three methods at several budgets and block sizes.",
    "table4": "The settings of Table 3 beside P1's Table 4, whose models are OLMo2-7B.",
    "table5": (
        "H2, as in P1's Table 5: random selection on all tasks, five seeds. Below it the other end "
        "of the scale: an oracle that always selects what holds the answer."
    ),
}


def pattern_section(evidence: Evidence) -> Section:
    """Paper against measured; its files are written on the way."""
    table = compare.pattern_table(evidence.patterns, evidence.tier)
    table.write(evidence.folder, "pattern")
    words = (
        "Models of another size can't have the paper's levels, but they can have its pattern: "
        "which backbone is ahead where it matters, and which settings are hard."
    )
    return Section("Paper against measured", (words,), tables=(table,))


def findings(evidence: Evidence) -> list[str]:
    """What the cells say about P1's two questions and its tables, one sentence each."""
    found = []
    for pattern in evidence.patterns:
        if pattern.scope == "all":
            x = pattern.agreement
            found.append(
                f"Table {pattern.table[-1]}: of P1's {pattern.decisive} decisive cells, "
                f"{pattern.measured} were measured and {pattern.agree} have its sign "
                f"({number(x.value, 0)} % [{number(x.low, 0)}, {number(x.high, 0)}]; "
                f"{pattern.against} against, {pattern.tied} tied)."
            )
    best = evidence.curves
    best = best[(best["rank"] == 1) & (best["task"] == hits.MEAN)]
    for row in best.to_dict("records"):
        low, high = row["difference low"], row["difference high"]
        found.append(
            f"H1, {figures.NAMES.get(row['method'], row['method'])} at {row['budget']}: the best "
            f"head's hit rate is {number(row['RAT+'])} % with the memory and "
            f"{number(row['Attention'])} % without (difference {number(row['difference'])} "
            f"[{number(low)}, {number(high)}] points: {_verdict(low, high)})."
        )
    means = evidence.selector_means
    for row in means[means["name"] == "gap random"].to_dict("records"):
        place = (means[selection.SETTING] == [row[c] for c in selection.SETTING]).all(axis=1)
        sides = means[place].set_index("name")["value"]
        found.append(
            f"H2, {figures.NAMES.get(row['method'], row['method'])} at {row['budget']} choosing at "
            f"random: {number(sides['RAT+ random'])} % with the memory and "
            f"{number(sides['Attention random'])} % without (difference {number(row['value'])} "
            f"[{number(row['low'])}, {number(row['high'])}] points: "
            f"{_verdict(row['low'], row['high'])})."
        )
    return found


def _verdict(low: float, high: float) -> str:
    """P1 finds RAT+ ahead in all of H1 and H2."""
    if low > 0:
        return "as in P1"
    return "against P1" if high < 0 else "undecided"


def missing(evidence: Evidence, outputs: list[str]) -> list[str]:
    """Settings of P1's tables that were not measured, or with fewer tasks than there."""
    found = []
    for name in (output for output in outputs if output in PAPER_TABLES):
        frame = compare.against_paper(name, evidence.cells, evidence.accuracy)
        place = ["method", "block_size", "budget", "selector", "backbone"]
        for setting, here in frame.groupby(place, sort=False):
            lacking = here.loc[here["measured"].isna(), "task"]
            if len(lacking):
                method, block, budget, selector, backbone = setting
                text = f"Table {name[-1]}: {backbone}, {method} at {budget}"
                text += f" with P1's block size {block}" if block > 1 else ""
                text += ", random selection" if selector == "random" else ""
                all_of_it = len(lacking) == len(here)
                found.append(text + ("" if all_of_it else f", tasks {', '.join(lacking)}") + ".")
    measured = {tuple(x) for x in evidence.rates[["method", "backbone"]].to_numpy()}
    for method, figure in (("quest", "fig2"), ("snapkv", "fig3")):
        if figure in outputs:
            found += [
                f"Figure {figure[-1]}: {backbone}, hit rates of {method}."
                for backbone in BACKBONES
                if (method, backbone) not in measured
            ]
    return found


def warning_section(evidence: Evidence) -> Section:
    points = sanity.warnings(evidence.store, evidence.samples, evidence.score)
    words = (
        "Checked: sparse attention better than dense beyond noise; a smaller budget better than a "
        "larger one beyond noise; prompts that were cut."
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
