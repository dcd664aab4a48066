"""Stages that run grids of cells: sweep, ablation, loss, methods, random_selector, reads.

`stage.cells`, for instance in conf/experiment/table2.yaml, has the grids of a sweep. Every
combination of a grid's lists is run for all `stage.trainings` of the grid's models, or else of
`stage.models`, or else for the configured model. Finished cells are skipped, so a killed sweep
resumes. The cells are those of stage=eval and stage=hit_rate, so all stages share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from ratplus_exp.analysis import sample_scores, tidy
from ratplus_exp.analysis.frame import all_finished
from ratplus_exp.analysis.means import method_means
from ratplus_exp.config import command_line_fields, plain, validate
from ratplus_exp.report import Table
from ratplus_exp.report.figures import accuracy_by_read
from ratplus_exp.report.tables import methods_table, model_table, random_table
from ratplus_exp.stages import report
from ratplus_exp.stages.cells import Job, MeasuringStage
from ratplus_exp.stages.common import (
    job_folder,
    model_name,
    model_option,
    multiply,
    option,
    show,
)
from ratplus_exp.stages.evaluate import Accuracy
from ratplus_exp.stages.hit_rate import HitRate
from ratplus_exp.stages.loss import Loss, loss_outputs
from ratplus_exp.stages.pool import fill_jobs, filled, raise_if_busy, raise_if_failed
from ratplus_exp.stages.reads import Reads, reads_table
from ratplus_exp.store import Finished
from ratplus_exp.tasks.qa import QA_FILES, no_file
from ratplus_exp.tracking import tracked

FIELDS = {
    "training": "model.training",
    "protocol": "data.protocol",
    "budget": "budget",
    "selector": "selector",
    "selector_seed": "selector_seed",
    "length": "data.length",
    "dilation": "method.dilation",
    "local": "method.local",
    "initial": "method.initial",
}
"""Where the configuration has those fields of a grid that need no more than to be set."""
MEASURING: dict[str, MeasuringStage] = {
    "eval": Accuracy(),
    "hit_rate": HitRate(),
    "loss": Loss(),
    "reads": Reads(),
}
Outputs = tuple[Table, list[Path]]  # of a stage: its table, its pictures


def run(cfg: DictConfig) -> None:
    """stage=sweep: fill the missing cells, then write `stage.outputs` from these settings."""
    jobs = [job_of(job) for job in expand(cfg)]
    models = {(job.cfg.model.backbone, job.cfg.model.name) for job in jobs}
    chosen = "model" in (cfg.stage.where or {}) or not any(cfg.stage.outputs.values())
    if not chosen and len(models) > len({backbone for backbone, _ in models}):
        raise ValueError(
            "stage.outputs compare one model of each backbone, not "
            f"{', '.join(sorted(name for _, name in models))}: use stage=ablation for several"
        )
    failed = fill_jobs(cfg, jobs)
    report.run(cfg, [cell for job in jobs for cell in job.cells.values()])
    raise_if_failed(failed)
    raise_if_busy(jobs)


def one_table(cfg: DictConfig) -> None:
    """The stages of `TABLES`: fill the missing cells, which are all of one length; print, write and
    track the stage's table and pictures, and write its cells.

    A stage without accuracies has cells of its own.
    """
    name = cfg.stage.name
    jobs = [job_of(job) for job in expand(cfg)]
    if len({job.cfg.data.length for job in jobs}) > 1:
        raise ValueError(f"stage={name} is of one length: set data.length instead")
    refuse_mixtures(name, jobs)
    protocols = {cell.key["first_token"] for job in jobs for cell in job.cells.values()} - {None}
    if name == "ablation" and len(protocols) > 1:
        raise ValueError("stage=ablation has one protocol for all of its cells: drop the others")
    measuring = name if name in MEASURING else "eval"
    counts = {max(cell.done(), job.examples) for job in jobs for cell in job.cells.values()}
    if measuring != "eval" and len(counts) > 1:  # accuracies are paired by sample
        raise ValueError(
            f"the cells of stage={name} would have {min(counts)} to {max(counts)} samples: set "
            f"data.examples={max(counts)}"
        )
    cells = all_finished(filled(cfg, jobs), measuring)
    table, pictures = TABLES[name](cfg, cells)
    show(table, name)
    report.write_cells(cells, job_folder(), {"cells": tidy(cells)} if measuring == "eval" else {})
    for picture in pictures:
        print(f"Figure: {picture}.")
    with tracked(cfg, job_folder()) as tracker:
        tracker.log({name: table})
        for picture in pictures:
            tracker.log({picture.stem: picture})


def ablation(cfg: DictConfig, cells: Sequence[Finished]) -> Outputs:
    """Models side by side at one budget, dense and under each method; and in the other settings of
    `stage.cells`."""
    setting = {name: cfg[name] for name in ("budget", "seed")} | {"tier": cfg.model.tier}
    token = next(filter(None, (x.cell.key["first_token"] for x in cells)), cfg.data.first_token)
    setting |= {"first_token": token, "protocol": "split" if token == "split" else "whole"}
    lengths = tidy(cells).groupby("model")["effective_memory_length"].mean()
    models = [model_option(cfg, name, cfg.stage.trainings[0]).name for name in cfg.stage.models]
    scorer = cfg.stage.scorer
    return model_table(sample_scores(cells), lengths, models, scorer, **setting), []


def methods(cfg: DictConfig, cells: Sequence[Finished]) -> Outputs:
    """Every method on both backbones at the same budgets, by accuracy within each, with the
    fractions that attention and selection read, and random selection of equal size (H2)."""
    means, left_out = method_means(cells, cfg.stage.scorer)
    classes: dict[str, Any] = {
        name: get_class(option("method", name).target) for name in set(means["method"])
    }
    phases = {name: cls.phase for name, cls in classes.items()}
    picture = accuracy_by_read(means, phases, job_folder())
    trainings = sorted(map(int, tidy(cells)["training"].unique()))
    return methods_table(means, cfg.stage.scorer, left_out, trainings), [picture]


def random_selector(cfg: DictConfig, cells: Sequence[Finished]) -> Outputs:
    """H2 for one model, method and budget.

    A uniformly random selector of equal size replaces the method's, and nothing else changes:
    forced candidates stay; Quest draws at every decoding step, layer and head, SnapKV once after
    the prompt, MoBA for every prompt token. The table also has the method's selector and an oracle.
    """
    frame = tidy(cells)
    setting = {"method": cfg.method.name, "budget": frame["budget"].iloc[0]}
    setting |= {"model": model_name(cfg), "scorer": cfg.stage.scorer}
    return random_table(frame, list(cfg.data.tasks), **setting), []


TABLES = {
    "ablation": ablation,
    "loss": loss_outputs,
    "methods": methods,
    "random_selector": random_selector,
    "reads": reads_table,
}
"""The table and pictures of each stage, from its finished cells."""


def job_of(cfg: DictConfig) -> Job:
    """The job of a configuration of a measuring stage."""
    return Job(cfg, MEASURING[cfg.stage.name])


def expand(cfg: DictConfig) -> list[DictConfig]:
    """The configurations of `stage.cells`, validated, ordered by model so that each is loaded once.

    Tasks without their file are left out.
    """
    files = QA_FILES if not cfg.data.path else {}  # of the tasks that need one
    absent = [x for x in cfg.data.tasks if x in files and not cfg.data.qa[files[x]]]
    if absent:
        print(f"Left out: {'; '.join(map(no_file, absent))}.")
        cfg = cfg.copy()
        cfg.data.tasks = [task for task in cfg.data.tasks if task not in absent]
    stage = plain(cfg.stage)
    every = {}
    if stage.get("models"):
        every = {"model": stage["models"], "training": stage["trainings"]}
    elif stage.get("trainings", [0]) != [0]:
        every = {"training": stage["trainings"]}
    grids: list[dict[str, Any]] = [*stage["cells"].values()] or [{}]
    entries = [entry for grid in grids for entry in multiply(every | grid)]
    refuse_unused(cfg, entries)
    entries = [x for x in entries if {*x.get("tasks", cfg.data.tasks)} & {*cfg.data.tasks}]
    if not entries:
        raise ValueError(f"no cell of stage={cfg.stage.name} has a task of data.tasks: add one")
    order = [*dict.fromkeys(map(_model, entries))]
    entries.sort(key=lambda entry: order.index(_model(entry)))
    return [configuration(cfg, entry) for entry in entries]


def refuse_mixtures(stage: str, jobs: list[Job]) -> None:
    """ValueError if a row of a stage's table would be the mean of cells that differ in more than
    task and seed."""
    if stage == "loss":  # its table has a row for each cell
        return
    place = ["model", "training", "method", "budget", "selector"]
    averaged = {"task", "data"} | ({"selector_seed"} if stage != "reads" else set())
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for job in jobs:
        key = next(iter(job.cells.values())).key
        other = first.setdefault(tuple(key[x] for x in place), key)
        names = sorted((key.keys() | other.keys()) - averaged)
        if differ := [x for x in names if key.get(x) != other.get(x)]:
            raise ValueError(
                f"stage={stage} averages all cells of a {', '.join(place)}: those that differ in "
                f"{', '.join(differ)} ({key['model']}, {key['method']}, {key['budget']}) need a "
                "run each"
            )


def refuse_unused(cfg: DictConfig, entries: list[dict[str, Any]]) -> None:
    """ValueError for a field of the model or method on the command line if every entry names
    another one, or another training."""
    for group, remedy in (
        ("model", "set stage.trainings, or stage.models=[] for the configured model"),
        ("method", "copy the method's file in conf/method, change it, and name it in the cells"),
    ):
        fields = command_line_fields(group)
        if fields and all(group in entry for entry in entries):
            raise ValueError(
                f"{group}.{fields[0]} has no effect, since stage={cfg.stage.name} names its "
                f"{group}s itself: {remedy}"
            )
    if "training" in command_line_fields("model") and all("training" in x for x in entries):
        raise ValueError("model.training has no effect here: set stage.trainings=[N]")


def _model(entry: dict[str, Any]) -> tuple[Any, Any]:
    return entry.get("model"), entry.get("training")


def configuration(cfg: DictConfig, entry: dict[str, Any]) -> DictConfig:
    """The sweep's configuration with the fields of one entry; stage=eval by default.

    length: of the context. blocks: its number of blocks, which sets the block size; without it the
    size is fixed. examples: an upper bound.
    """
    job = cfg.copy()
    with open_dict(job):
        for group in ("model", "method"):
            if group in entry:
                job[group] = option(group, entry[group])
        if job.model.tier != cfg.model.tier:
            raise ValueError(
                f"{job.model.name} is of the tier {job.model.tier}, but the data of the tier "
                f"{cfg.model.tier}: set model={job.model.name}, and only models of its tier"
            )
        measuring = cfg.stage.name if cfg.stage.name in MEASURING else "eval"
        job.stage = option("stage", entry.get("stage", measuring))
        for field in FIELDS.keys() & entry.keys():
            OmegaConf.update(job, FIELDS[field], entry[field])
        job.data.examples = min(cfg.data.examples, entry.get("examples", cfg.data.examples))
        if blocks := entry.get("blocks"):
            length = job.data.length
            if length % blocks:
                raise ValueError(
                    f"a context of {length} tokens doesn't divide into {blocks} blocks: "
                    "change data.length or the blocks of stage.cells"
                )
            job.method.block_size = length // blocks
        if "tasks" in entry:
            job.data.tasks = [task for task in entry["tasks"] if task in cfg.data.tasks]
    validate(job)
    return job
