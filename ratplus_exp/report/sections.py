"""The page of a report and its sections: each table and figure of the paper, from the results of
one pair."""

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from ratplus_exp.analysis import checks
from ratplus_exp.analysis.frame import TASKS, LeftOut, select
from ratplus_exp.analysis.hits import ranked_heads
from ratplus_exp.report import figures, tables
from ratplus_exp.report.accuracy import accuracy_table, tasks_table
from ratplus_exp.report.paper import PAPER_TABLES
from ratplus_exp.report.prose import paragraphs, render, sentence
from ratplus_exp.report.results import Results
from ratplus_exp.report.table import Table
from ratplus_exp.store import write_atomically

FIGURES = {"fig1": None, "fig2": "quest", "fig3": "snapkv", "fig4": None}
"""Each figure's method, where it is about one."""
PAGE = "report"


@dataclass(frozen=True)
class Section:
    """A part of the page, in the order of its fields.

    words: paragraphs; points: items of a list; picture: a PNG file; code: collapsed text.
    """

    title: str
    words: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    picture: Path | None = None
    caption: str = ""
    code: str = ""

    def base64(self) -> str:
        """The picture."""
        assert self.picture is not None
        return base64.b64encode(self.picture.read_bytes()).decode()


def section(results: Results, output: str, folder: Path, brief: bool = False) -> Section:
    """A table (table2 … table5, tasks; without columns of tasks if brief) or figure (fig1 … fig4,
    lengths), with its files in the folder. LeftOut if nothing of it was measured."""
    if output in PAPER_TABLES:
        return _table(results, output, folder, brief)
    if output in FIGURES:
        return _figure(results, output, folder)
    if output == "tasks":
        table = tasks_table(results).write(folder, output)
        picture = figures.accuracy_by_task(results, folder)
        return Section("Table of all tasks and protocols", tables=(table,), picture=picture)
    return _lengths(results, folder)


def paper_section(results: Results, folder: Path, alone: bool) -> Section:
    """Paper against measured; alone: attention's order of settings and tasks beside Table 4."""
    if alone:
        table = tables.rank_table(results).write(folder, "ranks")
        return Section("Paper against measured, by rank", tables=(table,))
    table = tables.pattern_table(results).write(folder, "pattern")
    return Section("Paper against measured", (sentence("pattern_words"),), tables=(table,))


def warning_section(results: Results) -> Section:
    """The results of all checks."""
    points = []
    for length, part in results.by_length.items():
        at = f"At {length} tokens: " if len(results.by_length) > 1 else ""
        points += [at + sentence("doubt", x) for x in checks.anomalies(part.draws)]
    return Section("Warnings", (sentence("checks"),), tuple(points) or ("None.",))


def page(
    results: Results,
    parts: list[Section],
    warnings: Section,
    lacking: list[str],
    settings: str,
    folder: Path,
) -> list[Section]:
    """All sections, the long tables last. parts: tables, figures and the pattern; lacking: what
    is missing; settings: the configuration to show."""
    findings = tables.findings_table(results).write(folder, "findings")
    order = ("Figure", "Paper", "Table")
    parts = sorted(parts, key=lambda part: (order.index(part.title.split()[0]), part.title))
    place = ["backbone", "training", "model", "checkpoint"]
    memory = results.every.groupby(place)["effective_memory_length"].mean()
    points = [sentence("model", *model, tokens) for model, tokens in memory.items()]
    points.append(sentence("samples", r=results))
    return [
        Section("Introduction", paragraphs("introduction", r=results), paragraphs("glossary")),
        Section("Findings", tables=(findings,)),
        *parts[:1],
        Section("Missing results", points=tuple(lacking) or ("Nothing.",)),
        warnings,
        *parts[1:],
        Section("Models, seeds, configuration", (sentence("files"),), tuple(points), code=settings),
        Section("Cost", tables=(tables.cost_table(results.used),)),
    ]


def write_page(title: str, sections: list[Section], folder: Path) -> tuple[Path, Path]:
    """Write report.html, which includes its pictures, and report.md, which links them."""
    html, markdown = folder / f"{PAGE}.html", folder / f"{PAGE}.md"
    write_atomically(html, render("page.html.j2", title=title, sections=sections))
    text = render("page.md.j2", title=title, sections=sections)
    write_atomically(markdown, re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return html, markdown


def _table(results: Results, name: str, folder: Path, brief: bool) -> Section:
    table = accuracy_table(results, name).write(folder, name)
    tables.against_table(results, name).write(folder, f"{name}_against_paper")
    shown, picture, caption = [table.without(TASKS) if brief else table], None, ""
    if name in ("table3", "table4"):
        picture = figures.gains(results, name, folder)
        caption = sentence("gains_caption", r=results)
    if name == "table5" and len(results.selector_means):
        shown.append(tables.selector_table(results).write(folder, "selectors"))
        picture = figures.selectors(results, folder)
        caption = sentence("selectors_caption", r=results)
    words = (sentence(name), *paragraphs("table_files", name, brief))
    return Section(f"Table {name[-1]}", words, (), tuple(shown), picture, caption)


def _figure(results: Results, name: str, folder: Path) -> Section:
    method, cells = FIGURES[name], results.rates
    shown: tuple[Table, ...] = ()
    if method:
        picture = figures.ranked_heads(results, method, folder, name)
        cells = cells[cells["method"] == method]
    elif name == "fig1":
        picture = figures.accuracy_by_budget(results, folder)
        cells = results.cells[results.cells["selector"] == "topk"]
    else:
        picture = figures.heads_by_task(results, folder)
    if picture is None:
        raise LeftOut(f"no finished cells for {name}: run make {name}")
    if method:
        shown = (
            tables.heads_table(results, method).write(folder, f"{name}_heads"),
            tables.top_heads_table(results, method).write(folder, f"{name}_top_heads"),
        )
        curves = select(results.curves, {"method": method})
        curves.to_csv(folder / f"{name}_ranks.csv", index=False)
        ranked_heads(cells).to_csv(folder / f"{name}_ranked_heads.csv", index=False)
    words = (sentence("ranked", method) if method else sentence(name),)
    caption = sentence("figure_caption", r=results, cells=cells)
    return Section(f"Figure {name[-1]}", words, (), shown, picture, caption)


def _lengths(results: Results, folder: Path) -> Section:
    picture = figures.accuracy_by_length(results, folder)
    if picture is None:
        raise LeftOut("no finished cells of several lengths: run make lengths")
    results.length_curves.to_csv(folder / "lengths.csv", index=False)
    caption = sentence("figure_caption", r=results, cells=results.cells)
    return Section("Figure of lengths", (sentence("lengths"),), picture=picture, caption=caption)
