"""stage=report: tables, figures and one page from the cells that are finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf, open_dict

from ratplus_exp.config import plain
from ratplus_exp.models.loading import check_model
from ratplus_exp.results import Store, sample_scores, tidy, write_atomically, write_cells_csv
from ratplus_exp.results.findings import findings
from ratplus_exp.results.frame import select
from ratplus_exp.results.hits import hit_rates
from ratplus_exp.results.labels import first_token_note, measured_at
from ratplus_exp.results.missing import missing
from ratplus_exp.results.page import Section, write_page
from ratplus_exp.results.sections import (
    Evidence,
    cost_table,
    pattern_section,
    section,
    warning_section,
)
from ratplus_exp.stages.common import job_folder, option, resolve
from ratplus_exp.tracking import log_image, log_table, tracked

PAGE = "report"


def run(cfg: DictConfig) -> None:
    """Print `stage.outputs` (Markdown, CSV, LaTeX, PNG, PDF) and write them with their cells.

    An output that nothing was measured of is said to be missing, unless it is the only one.
    """
    wanted = [name for name, on in cfg.stage.outputs.items() if on]
    evidence = gather(cfg)
    evidence.folder.mkdir(parents=True, exist_ok=True)
    parts, absent = [], []
    for name in (name for name in wanted if name != PAGE):
        try:
            brief = PAGE in wanted and name == "table4" and "table3" in wanted
            parts.append(section(evidence, name, brief))
        except ValueError as error:
            if len(wanted) == 1:
                raise
            absent.append(str(error))
    if PAGE in wanted or any(part.tables for part in parts):
        parts.append(pattern_section(evidence))
    ids = {*evidence.cells["cell"], *evidence.rates["cell"]}
    write_cells_csv(evidence.cells, evidence.folder / "cells.csv")
    if len(evidence.rates):
        evidence.rates.to_csv(evidence.folder / "hit_rates.csv", index=False)
    _write_provenance(evidence.store, ids, evidence.folder)
    for table in (table for part in parts for table in part.tables):
        print(table.to_text())
    for reason in absent:
        print(f"Left out: {reason}")
    warnings = warning_section(evidence)
    for point in warnings.points:
        print(f"Warning: {point}" if point != "None." else "No warnings.")
    if PAGE in wanted:
        lacking = [*missing(evidence.cells, evidence.rates, wanted), *absent]
        pages = write_page(
            f"Decaying memory and query-aware KV sparsity: "
            f"{measured_at(evidence.tier, evidence.first_token)}",
            _page(cfg, evidence, parts, warnings, lacking),
            evidence.folder,
            PAGE,
        )
        print(f"The whole report: {pages[0]} and {pages[1].name}.")
    print(f"Written to {evidence.folder}.")
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
        models = [_model(cfg, name) for name in cfg.stage.models]
        where["model"] = [model.name for model in models]
        where["checkpoint"] = [
            check_model(resolve(model.path), model.sha256, model.backbone)[:16] for model in models
        ]
    where |= plain(cfg.stage.where)

    def fitting(frame: pd.DataFrame) -> pd.DataFrame:
        first = frame["first_token"]
        return frame[first.isna() | (first == cfg.stage.first_token)]

    frames = select(tidy(store), where), sample_scores(store, **where), hit_rates(store, **where)
    cells, samples, rates = map(fitting, frames)
    if cells.empty and rates.empty:
        raise ValueError(
            f"no finished cells at tier {cfg.model.tier!r} and {cfg.data.length} tokens in "
            f"{store.root}: evaluate first"
        )
    folder = Path(cfg.stage.folder) if cfg.stage.folder else job_folder()
    tier, scorer, first = cfg.model.tier, cfg.stage.scorer, cfg.stage.first_token
    return Evidence(store, cells, samples, rates, tier, scorer, first, folder)


def _model(cfg: DictConfig, name: str) -> DictConfig:
    """One option of the group model, in this configuration: its folder may lie in `output`."""
    job = cfg.copy()
    with open_dict(job):
        job.model = option("model", name)
    return job.model


def _page(
    cfg: DictConfig,
    evidence: Evidence,
    parts: list[Section],
    warnings: Section,
    lacking: list[str],
) -> list[Section]:
    cells = pd.concat([evidence.cells, evidence.rates.drop_duplicates("cell")])
    points = [
        f"{backbone}: model {model}, checkpoint {checkpoint}, effective memory length "
        + ("none" if here.isna().all() else f"{here.mean():.1f} tokens")
        for (backbone, model, checkpoint), here in cells.groupby(
            ["backbone", "model", "checkpoint"]
        )["effective_memory_length"]
    ]
    seeds, draws = (sorted(set(cells[x].dropna())) for x in ("seed", "selector_seed"))
    points.append(
        f"Seeds of the samples: {', '.join(map(str, seeds))}; of random selection: "
        f"{', '.join(map(str, draws))}."
    )
    points.append(f"Samples a task: {cells['n'].min()} to {cells['n'].max()}.")
    settings = Section(
        "Models, seeds, configuration",
        (
            "Every cell's key and who ran it are in provenance.json, all accuracies in cells.csv, "
            "all hit rates in hit_rates.csv. Below: what this page was asked for, and the data; "
            "each cell's own method and budget are in its key.",
        ),
        tuple(points),
        code=_settings(cfg),
    )
    ids = {*evidence.cells["cell"], *evidence.rates["cell"]}
    cost = Section("What it cost", tables=(cost_table(evidence.store, ids),))
    introduction = [*_INTRODUCTION, _ONE_TRAINING.format(first_token_note(evidence.first_token))]
    introduction += [] if evidence.tier == "paper" else [_SCALE]
    # What is seen at a glance comes first, the long tables last.
    order = sorted(parts, key=lambda part: (_ORDER.index(part.title.split()[0]), part.title))
    first = [part for part in order if part.title == "Figure 1"]
    found = findings(evidence.samples, evidence.score, evidence.curves, evidence.patterns)
    return [
        Section("What this is", tuple(introduction), points=_WORDS),
        Section("What was found", (_FOUND,), points=tuple(found) or ("Nothing yet.",)),
        *first,
        Section("What is missing", points=tuple(lacking) or ("Nothing.",)),
        warnings,
        *(part for part in order if part not in first),
        settings,
        cost,
    ]


def _settings(cfg: DictConfig) -> str:
    """The configuration that the page depends on; the rest belongs to its cells."""
    stage = {k: v for k, v in plain(cfg.stage).items() if k not in ("name", "run", "folder")}
    text = OmegaConf.to_yaml(OmegaConf.create({"stage": stage, "data": plain(cfg.data)}))
    assert isinstance(text, str)
    return text


def _write_provenance(store: Store, ids: set[str], folder: Path) -> Path:
    """provenance.json: for every setting its key, its cells by task, and who ran them."""
    entries: dict[str, dict[str, Any]] = {}
    for cell in store.cells():
        if cell.id not in ids:
            continue
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
    return path


_INTRODUCTION = (
    "A language model that reads a long text keeps a key and a value of every token, and looks at "
    "all of them for each token that it writes. Query-aware sparse methods look at a small part, "
    "the budget: Quest picks blocks at every step of the answer, MoBA picks blocks for every token "
    "of the prompt, SnapKV keeps some tokens after the prompt and throws the rest away.",
    "Wei and Gulcehre (P1, arXiv 2605.28640) find that such methods lose less accuracy on models "
    "whose keys and values are a decaying memory of earlier ones (RAT+) than on plain attention. "
    "They ask why. H1: does the memory help to select the right places? H2: does it carry "
    "information past the selector, so that even a random choice finds it?",
    "The tasks are RULER's eight needles in a haystack: one needle (S-1 to S-3), one among several "
    "keys (MK-1 to MK-3), several values of a key (MV) and several keys at once (MQ).",
)
_ONE_TRAINING = (
    "Each backbone was trained once. All intervals are over evaluation samples, not over "
    "trainings: another training run could shift any difference by more than its interval. {} "
    "The other one (stage.first_token) makes another report."
)
_WORDS = (
    "Tier: pocket, small or paper, the scale of the models and their contexts.",
    "Checkpoint: the first digits of a model file's SHA-256.",
    "Block: tokens a block; 1 where single tokens are selected. k: blocks or tokens selected. "
    "Budget: the share of the context that they are, nominally.",
    "Kept: the share of the keys and values that was really attended (Quest, MoBA) or stored "
    "(SnapKV), which is more than the budget where some are always kept.",
    "Dense: ordinary attention to everything. Points: percentage points. [low, high]: a 95 % "
    "bootstrap interval.",
    "As in P1, against P1, undecided: the interval lies on P1's side of zero, on the other side, "
    "or on both.",
)
_FOUND = (
    "About this one pair of models; the intervals say how sure a number is for them, not how "
    "another pair would turn out."
)
_ORDER = ("Figure", "Paper", "Table")  # first words of the parts' titles
_SCALE = (
    "These models are far smaller than P1's, with shorter contexts and blocks scaled alike. Their "
    "levels are not the paper's; what can be compared is the pattern, that is signs and order."
)
