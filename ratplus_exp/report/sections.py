"""The parts of a report: each table and figure of the paper from the cells of one pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ratplus_exp.analysis import frame, hits, sanity
from ratplus_exp.analysis.pattern import Pattern, cell_by_cell, patterns
from ratplus_exp.analysis.selectors import selector_means
from ratplus_exp.report import figures, tables
from ratplus_exp.report.accuracy import accuracy_table, tasks_table
from ratplus_exp.report.page import Picture, Section
from ratplus_exp.report.paper import PAPER_TABLES, paper_tables
from ratplus_exp.report.prose import METHODS, paragraphs, say, span, trainings_of
from ratplus_exp.store import Cell, Store


@dataclass(frozen=True)
class Evidence:
    """Finished cells of one pair of models, at one tier and context length, read once.

    cells, rates: rows of `tidy` and `hit_rates`; samples, hit_samples: of `sample_scores`; stored:
    all cells of the store by id; both, both_samples: as cells and samples, of both protocols.
    """

    cells: pd.DataFrame
    samples: pd.DataFrame
    rates: pd.DataFrame
    hit_samples: pd.DataFrame
    both: pd.DataFrame
    both_samples: pd.DataFrame
    stored: dict[str, Cell]
    tier: str
    scorer: str
    first_token: str
    folder: Path

    @classmethod
    def read(
        cls, store: Store, where: dict[str, Any], first_token: str, whole: str, **rest: Any
    ) -> Evidence:
        """where: choices by column of `tidy`; first_token: of the cells to which it matters; whole:
        the same of those of whole prompts."""
        stored = list(store.cells())

        def fitting(rows: pd.DataFrame, *kinds: str) -> pd.DataFrame:
            return rows[rows["first_token"].isna() | rows["first_token"].isin(kinds)]

        cells = frame.select(frame.tidy(stored), where)
        samples = frame.sample_scores(stored, **where)
        return cls(
            fitting(cells, first_token),
            fitting(samples, first_token),
            fitting(hits.hit_rates(stored, **where), first_token),
            fitting(frame.sample_scores(stored, hits.STAGE, **where), first_token),
            fitting(cells, whole, "split"),
            fitting(samples, whole, "split"),
            {cell.id: cell for cell in stored},
            first_token=first_token,
            **rest,
        )

    @cached_property
    def used(self) -> list[Cell]:
        """The cells that the report is made of, in the order of their names."""
        ids = {*self.cells["cell"], *self.rates["cell"], *self.both["cell"]}
        return [cell for name, cell in self.stored.items() if name in ids]

    @cached_property
    def trainings(self) -> list[int]:
        return sorted({*trainings_of(self.cells), *trainings_of(self.rates)})

    @cached_property
    def curves(self) -> pd.DataFrame:
        return hits.rank_curves(self.hit_samples)

    @cached_property
    def selector_means(self) -> pd.DataFrame:
        return selector_means(self.samples, self.scorer)

    @cached_property
    def patterns(self) -> list[Pattern]:
        """Of every table of the paper that has a measured cell."""
        by_table = (patterns(paper_tables(t), self.samples, self.scorer) for t in PAPER_TABLES)
        return [p for found in by_table if found[0].measured for p in found]

    @property
    def where(self) -> dict[str, Any]:
        """What titles and captions say of the cells."""
        return {"tier": self.tier, "first_token": self.first_token}

    def titled(self, what: str) -> str:
        context = self.cells["context_length"] if len(self.cells) else self.rates["context_length"]
        return f"{what}; {say('at', **self.where)}, {context.iloc[0]} tokens"


def section(evidence: Evidence, output: str, brief: bool = False) -> Section:
    """A table (table2 … table5) or figure (fig1 … fig4), whose files are written on the way.

    brief: a table without its columns of tasks.

    Raises:
        ValueError: nothing of it was measured, or the output is unknown.
    """
    if output in PAPER_TABLES:
        return _table(evidence, output, brief)
    if output == "tasks":
        table = tasks_table(
            evidence.both, evidence.both_samples, evidence.scorer, tier=evidence.tier
        )
        table.write(evidence.folder, output)
        return Section("Table of all tasks and protocols", tables=(table,))
    if output not in _FIGURES:
        known = ", ".join((*PAPER_TABLES, *_FIGURES))
        raise ValueError(f"stage.outputs has the unknown {output!r}: use some of {known}, report")
    return _FIGURES[output](evidence, output)


def _table(evidence: Evidence, name: str, brief: bool) -> Section:
    first, folder, scorer = evidence.first_token, evidence.folder, evidence.scorer
    table = accuracy_table(
        evidence.cells, evidence.samples, evidence.tier, name, scorer, first_token=first
    )
    table.write(folder, name)
    against = cell_by_cell(paper_tables(name), evidence.cells, scorer)
    beside = tables.against_table(against, name, trainings=evidence.trainings, **evidence.where)
    beside.write(folder, f"{name}_against_paper")
    shown, pictures, caption = [table.without(frame.TASKS) if brief else table], [], ""
    if name in ("table3", "table4"):
        title = f"RAT+ minus Attention: the paper's Table {name[-1]} and "
        title += say("at", **evidence.where)
        pictures = figures.gains(against, folder, f"{name}_gains", title)
        caption = say("gains_caption", first_token=first)
    if name == "table5" and len(evidence.selector_means):
        extra = tables.selector_table(
            evidence.selector_means,
            evidence.cells,
            scorer,
            trainings=evidence.trainings,
            **evidence.where,
        )
        extra.write(folder, "selectors")
        shown.append(extra)
        title = evidence.titled("Who selects: mean accuracy over the tasks")
        pictures = figures.selectors(evidence.selector_means, folder, "selectors", title)
        caption = say("selectors_caption", first_token=first)
    words = (say(name), *paragraphs("table_files", name=name, brief=brief))
    drawn = tuple(Picture(path, caption) for path in pictures[:1])
    return Section(f"Table {name[-1]}", words, tables=tuple(shown), pictures=drawn)


def _fig1(evidence: Evidence, name: str) -> Section:
    title = evidence.titled("Mean accuracy over the tasks (dashed: dense)")
    cells = evidence.cells[evidence.cells["selector"] == "topk"]
    pictures = figures.accuracy_by_budget(
        evidence.samples, evidence.scorer, evidence.folder, name, title
    )
    return _figure(evidence, name, say("fig1"), pictures, cells)


def _ranked(method: str) -> Callable[[Evidence, str], Section]:
    def build(evidence: Evidence, name: str) -> Section:
        title = evidence.titled(f"H1, {METHODS[method]}: heads by hit rate, mean of the tasks")
        curves, rates = (x[x["method"] == method] for x in (evidence.curves, evidence.rates))
        pictures = figures.ranked_heads(curves, method, evidence.folder, name, title)
        found = _figure(evidence, name, say("ranked", method=method), pictures, rates)
        where = evidence.where | {"trainings": trainings_of(rates)}
        shown = tables.heads_table(curves, rates, **where), tables.top_heads_table(curves, **where)
        for table, what in zip(shown, ("heads", "top_heads"), strict=True):
            table.write(evidence.folder, f"{name}_{what}")
        curves.to_csv(evidence.folder / f"{name}_ranks.csv", index=False)
        ranked = hits.ranked_heads(rates)
        ranked.to_csv(evidence.folder / f"{name}_ranked_heads.csv", index=False)
        return replace(found, tables=shown)

    return build


def _fig4(evidence: Evidence, name: str) -> Section:
    budgets = figures.by_size(evidence.curves)
    title = evidence.titled("H1, hit rate of the best head by task")
    pictures = []
    if budgets:
        title += f", budget {budgets[-1]}"
        pictures = figures.heads_by_task(evidence.curves, budgets[-1], evidence.folder, name, title)
    return _figure(evidence, name, say("fig4"), pictures, evidence.rates)


def _figure(
    evidence: Evidence, name: str, words: str, pictures: list[Path], cells: pd.DataFrame
) -> Section:
    if not pictures:
        raise ValueError(f"no finished cells for {name}: run make {name}")
    caption = say(
        "figure_caption",
        n=span(cells["n"]),
        seeds=sorted(cells["seed"].unique()),
        trainings=trainings_of(cells),
        first_token=evidence.first_token,
    )
    shown = tuple(Picture(path, caption) for path in pictures[:1])
    return Section(f"Figure {name[-1]}", (words,), pictures=shown)


_FIGURES: dict[str, Callable[[Evidence, str], Section]] = {
    "fig1": _fig1,
    "fig2": _ranked("quest"),
    "fig3": _ranked("snapkv"),
    "fig4": _fig4,
}


def pattern_section(evidence: Evidence) -> Section:
    """Paper against measured; its files are written on the way."""
    where = evidence.where | {"trainings": evidence.trainings}
    table = tables.pattern_table(evidence.patterns, **where)
    table.write(evidence.folder, "pattern")
    return Section("Paper against measured", (say("pattern_words"),), tables=(table,))


def warning_section(evidence: Evidence) -> Section:
    """What should make a reader doubt the numbers, a point each; "None." where there is nothing."""
    points = [say("doubt", x=x) for x in sanity.doubts(evidence.samples, evidence.scorer)]
    points += [
        say("cut", cell=evidence.stored[name].path.name, count=count)
        for name, count in sanity.cut_prompts(evidence.samples).items()
    ]
    return Section("Warnings", (say("checks"),), tuple(points) or ("None.",))


def model_section(evidence: Evidence, settings: str) -> Section:
    """The models, seeds and sample counts; settings: the configuration to show."""
    cells = pd.concat([evidence.cells, evidence.rates.drop_duplicates("cell")])
    place = ["backbone", "training", "model", "checkpoint"]
    points = [
        f"{backbone}, training {training}: model {model}, checkpoint {checkpoint}, effective "
        f"memory length {'none' if here.isna().all() else f'{here.mean():.1f} tokens'}"
        for (backbone, training, model, checkpoint), here in cells.groupby(place)[
            "effective_memory_length"
        ]
    ]
    seeds, draws = (sorted(set(cells[x].dropna())) for x in ("seed", "selector_seed"))
    points.append(
        f"Seeds of the samples: {', '.join(map(str, seeds))}; of random selection: "
        f"{', '.join(map(str, draws))}."
    )
    points.append(f"Samples a task: {cells['n'].min()} to {cells['n'].max()}.")
    title = "Models, seeds, configuration"
    return Section(title, (say("files"),), tuple(points), code=settings)
