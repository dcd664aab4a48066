"""stage=report: tables, figures and one page from the finished cells."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from ratplus_exp.analysis.checks import check_unmixed
from ratplus_exp.analysis.frame import BACKBONES, LeftOut, grouped
from ratplus_exp.config import plain
from ratplus_exp.report import sections
from ratplus_exp.report.paper import PAPER_TABLES
from ratplus_exp.report.prose import sentence
from ratplus_exp.report.results import Results
from ratplus_exp.report.sections import FIGURES, PAGE
from ratplus_exp.stages.common import checkpoint_of, composed, job_folder, model_option, resolve
from ratplus_exp.stages.missing import missing
from ratplus_exp.store import Cell, Finished, Store, remove_drafts, write_atomically
from ratplus_exp.tracking import tracked


def run(cfg: DictConfig, like: Sequence[Cell] | None = None) -> None:
    """Print `stage.outputs` and write them (Markdown, CSV, LaTeX, PNG, PDF) with their cells.

    like: the cells of a sweep: their settings are shown, of any seed (None: all finished cells).
    An output without cells is left out with a message, or refused if it is the only one. LeftOut,
    before anything is written, if some do not belong together.
    """
    outputs = [name for name, on in cfg.stage.outputs.items() if on]
    store = Store(resolve(cfg.results))
    settings = {name: cfg.data[name] for name in ("first_token", "protocol")}
    results = Results.read(store, _where(cfg), like, scorer=cfg.stage.scorer, **settings)
    for each in results.protocols.values() if "tasks" in outputs else [results]:
        for of_length in each.by_length.values() if outputs else ():
            for cells in (of_length.cells, of_length.rates.drop_duplicates("cell")):
                check_unmixed(grouped(cells))
    folder = Path(cfg.stage.folder) if cfg.stage.folder else job_folder()
    folder.mkdir(parents=True, exist_ok=True)
    remove_drafts(folder)
    parts, absent = [], []
    for name in (name for name in outputs if name != PAGE):
        brief = PAGE in outputs and name == "table4" and "table3" in outputs
        try:
            parts.append(sections.section(results, name, folder, brief))
        except LeftOut as error:
            if len(outputs) == 1:
                raise
            absent.append(str(error))
    if PAGE in outputs or (any(part.tables for part in parts) and outputs != ["tasks"]):
        alone = "table4" in outputs and set(results.cells["backbone"]) == {BACKBONES[0]}
        parts.append(sections.paper_section(results, folder, alone))
    shown = list(results.protocols.values()) if "tasks" in outputs else [results]
    cells = pd.concat([part.cells for part in shown]).drop_duplicates("cell")
    used = {x.cell.id: x for part in shown for x in part.used}.values()
    rates = {"hit_rates": results.rates} if len(results.rates) else {}
    write_cells(used, folder, {"cells": cells} | rates)
    for table in (table for part in parts for table in part.tables):
        print(table.to_text())
    for reason in absent:
        print(f"Left out: {reason}")
    warnings = sections.warning_section(results)
    for point in warnings.points:
        print("No warnings." if point == "None." else f"Warning: {point}")
    if PAGE in outputs:
        title = f"Decaying memory and query-aware KV sparsity: {sentence('at', results)}"
        papers = [name for name in outputs if name in (*PAPER_TABLES, *FIGURES)]
        needed = {x: plain(composed(f"experiment={x}").stage)["cells"] for x in papers}
        lacking = [*missing(results, needed), *absent]
        every = sections.page(results, parts, warnings, lacking, _settings(cfg), folder)
        html, markdown = sections.write_page(title, every, folder)
        print(f"The whole report: {html} and {markdown.name}.")
    print(f"Written to {folder}.")
    with tracked(cfg, job_folder()) as tracker:
        for part in parts:
            tracker.log({table.title: table for table in part.tables})
            if part.picture:
                tracker.log({part.picture.stem: part.picture})


def _where(cfg: DictConfig) -> dict[str, Any]:
    """Choices by column of cells.csv: tier, context length, the models, and stage.where."""
    where: dict[str, Any] = {"tier": cfg.model.tier, "context_length": cfg.data.length}
    if cfg.stage.models:
        models = [model_option(cfg, m, t) for m in cfg.stage.models for t in cfg.stage.trainings]
        where["model"] = [model.name for model in models]
        where["training"] = [model.training for model in models]
        where["checkpoint"] = [checkpoint_of(model)[:16] for model in models]
    return where | (plain(cfg.stage.where) if cfg.stage.where else {})


def _settings(cfg: DictConfig) -> str:
    """The configuration of the page; that of its cells is in the store."""
    stage = {k: v for k, v in plain(cfg.stage).items() if k not in ("name", "folder")}
    return str(OmegaConf.to_yaml(OmegaConf.create({"stage": stage, "data": plain(cfg.data)})))


def write_cells(
    cells: Iterable[Finished], folder: Path, frames: Mapping[str, pd.DataFrame]
) -> None:
    """Write the frames as NAME.csv; and provenance.json, for every setting its key, its cells by
    task, and their runs."""
    for name, frame in frames.items():
        text = frame.to_csv(index=False, lineterminator="\n")
        write_atomically(folder / f"{name}.csv", text)
    entries: dict[str, dict[str, Any]] = {}
    for cell, _, provenance, _ in cells:
        key = {k: v for k, v in cell.key.items() if k not in ("data", "task")}
        entry = entries.setdefault(json.dumps(key), {"key": key, "cells": {}, "runs": {}})
        entry["cells"][cell.key["task"]] = cell.id
        for run in provenance:
            date = run.get("date", "")
            run = {k: v for k, v in run.items() if k not in ("config", "date", "from_sample")}
            new = {"first": date, "last": date, "run": run}
            seen = entry["runs"].setdefault(json.dumps(run), new)
            seen["first"], seen["last"] = min(seen["first"], date), max(seen["last"], date)
    content = [entry | {"runs": list(entry["runs"].values())} for entry in entries.values()]
    write_atomically(folder / "provenance.json", json.dumps(content, indent=1) + "\n")
