"""stage=report: tables, figures and one page from the cells that are finished."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ratplus_exp.analysis.frame import cost
from ratplus_exp.config import plain
from ratplus_exp.report.findings import findings
from ratplus_exp.report.missing import missing
from ratplus_exp.report.page import Section, write_page
from ratplus_exp.report.prose import paragraphs, say
from ratplus_exp.report.sections import (
    Evidence,
    model_section,
    pattern_section,
    section,
    warning_section,
)
from ratplus_exp.report.tables import cost_table
from ratplus_exp.stages.common import (
    checkpoint_of,
    first_token_of,
    job_folder,
    model_option,
    resolve,
)
from ratplus_exp.store import Cell, Store, write_atomically
from ratplus_exp.tracking import log_image, log_table, tracked

PAGE = "report"


def run(cfg: DictConfig) -> None:
    """Print `stage.outputs` (Markdown, CSV, LaTeX, PNG, PDF) and write them with their cells.

    An output that nothing was measured of is said to be missing, unless it is the only one.
    """
    wanted = [name for name, on in cfg.stage.outputs.items() if on]
    evidence = gather(cfg)
    folder = evidence.folder
    folder.mkdir(parents=True, exist_ok=True)
    parts, absent = [], []
    for name in (name for name in wanted if name != PAGE):
        try:
            brief = PAGE in wanted and name == "table4" and "table3" in wanted
            parts.append(section(evidence, name, brief))
        except ValueError as error:
            if len(wanted) == 1:
                raise
            absent.append(str(error))
    if PAGE in wanted or (any(part.tables for part in parts) and wanted != ["tasks"]):
        parts.append(pattern_section(evidence))
    for name, frame in (("cells", evidence.cells), ("hit_rates", evidence.rates)):
        if len(frame) or name == "cells":
            text = frame.map(_not_a_formula).to_csv(index=False, lineterminator="\n")
            write_atomically(folder / f"{name}.csv", text)
    _write_provenance(evidence.used, folder)
    for table in (table for part in parts for table in part.tables):
        print(table.to_text())
    for reason in absent:
        print(f"Left out: {reason}")
    warnings = warning_section(evidence)
    for point in warnings.points:
        print(f"Warning: {point}" if point != "None." else "No warnings.")
    if PAGE in wanted:
        lacking = [*missing(evidence.cells, evidence.rates, wanted), *absent]
        title = f"Decaying memory and query-aware KV sparsity: {say('at', **evidence.where)}"
        page = _page(cfg, evidence, parts, warnings, lacking)
        pages = write_page(title, page, folder, PAGE)
        print(f"The whole report: {pages[0]} and {pages[1].name}.")
    print(f"Written to {folder}.")
    with tracked(cfg, job_folder()) as tracker:
        for part in parts:
            for table in part.tables:
                log_table(tracker, table.title, table)
            for picture in part.pictures:
                log_image(tracker, picture.path.stem, picture.path)


def gather(cfg: DictConfig) -> Evidence:
    """The finished cells that the configuration asks for; ValueError if there are none."""
    store = Store(resolve(cfg.results))
    where: dict[str, Any] = {"tier": cfg.model.tier, "context_length": cfg.data.length}
    if cfg.stage.models:
        models = [model_option(cfg, m, t) for m in cfg.stage.models for t in cfg.stage.trainings]
        where["model"] = [model.name for model in models]
        where["training"] = [model.training for model in models]
        where["checkpoint"] = [checkpoint_of(model)[:16] for model in models]
    where |= plain(cfg.stage.where) if cfg.stage.where else {}
    folder = Path(cfg.stage.folder) if cfg.stage.folder else job_folder()
    evidence = Evidence.read(
        store,
        where,
        first_token_of(cfg),
        cfg.stage.first_token,
        tier=cfg.model.tier,
        scorer=cfg.stage.scorer,
        folder=folder,
    )
    if not evidence.used:
        raise ValueError(
            f"no finished cells at tier {cfg.model.tier!r} and {cfg.data.length} tokens in "
            f"{store.root}: evaluate first"
        )
    return evidence


def _page(
    cfg: DictConfig,
    evidence: Evidence,
    parts: list[Section],
    warnings: Section,
    lacking: list[str],
) -> list[Section]:
    # What is seen at a glance comes first, the long tables last.
    order = sorted(parts, key=lambda part: (_ORDER.index(part.title.split()[0]), part.title))
    first = [part for part in order if part.title == "Figure 1"]
    found = findings(evidence.samples, evidence.scorer, evidence.curves, evidence.patterns)
    trainings = evidence.trainings
    return [
        Section(
            "What this is",
            paragraphs("introduction", trainings=trainings, **evidence.where),
            points=paragraphs("glossary"),
        ),
        Section(
            "What was found",
            (say("found", trainings=trainings),),
            points=tuple(found) or ("Nothing yet.",),
        ),
        *first,
        Section("What is missing", points=tuple(lacking) or ("Nothing.",)),
        warnings,
        *(part for part in order if part not in first),
        model_section(evidence, _settings(cfg)),
        Section("What it cost", tables=(cost_table(cost(evidence.used)),)),
    ]


def _not_a_formula(value: Any) -> Any:
    """What a spreadsheet takes for text, whoever named it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@")) else value


def _settings(cfg: DictConfig) -> str:
    """The configuration that the page depends on; the rest belongs to its cells."""
    stage = {k: v for k, v in plain(cfg.stage).items() if k not in ("name", "folder")}
    text = OmegaConf.to_yaml(OmegaConf.create({"stage": stage, "data": plain(cfg.data)}))
    assert isinstance(text, str)
    return text


def _write_provenance(cells: Iterable[Cell], folder: Path) -> None:
    """provenance.json: for every setting its key, its cells by task, and who ran them."""
    entries: dict[str, dict[str, Any]] = {}
    for cell in cells:
        key = {k: v for k, v in cell.key.items() if k not in ("data", "task")}
        entry = entries.setdefault(json.dumps(key), {"key": key, "cells": {}, "runs": []})
        entry["cells"][cell.key["task"]] = cell.id
        for run in cell.provenance():
            date = run.get("date", "")
            run = {k: v for k, v in run.items() if k not in ("config", "date", "from_sample")}
            known = next((r for r in entry["runs"] if r["run"] == run), None)
            if known is None:
                entry["runs"].append({"first": date, "last": date, "run": run})
            else:
                known["first"], known["last"] = min(known["first"], date), max(known["last"], date)
    path = folder / "provenance.json"
    write_atomically(path, json.dumps(list(entries.values()), indent=1) + "\n")


_ORDER = ("Figure", "Paper", "Table")  # first words of the parts' titles
