"""stage=ablation: several models, for instance variants of one, side by side at one budget.

Means over the tasks, dense and under each method, and how far each model is from the first one. The
cells are those of stage=eval.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from ratplus_exp.analysis import SCORERS, Estimate, resample, sample_scores
from ratplus_exp.report import Table
from ratplus_exp.report.prose import METHODS, interval, number, trainings_of
from ratplus_exp.stages.cells import Job
from ratplus_exp.stages.common import job_folder
from ratplus_exp.stages.sweep import complete, configuration
from ratplus_exp.tracking import log_table, tracked


def run(cfg: DictConfig) -> None:
    """Run the cells that are missing, and print and write the table."""
    jobs = {
        (model, method, training): _job(cfg, model, method, training)
        for model in cfg.stage.models
        for method in cfg.stage.methods
        for training in cfg.stage.trainings
    }
    complete(cfg, list(jobs.values()))
    cells = [cell for job in jobs.values() for cell in job.cells.values()]
    table = _table(cfg, sample_scores(cells))
    table.write(job_folder(), "ablation")
    print(table.to_text())
    print(f"Written to {job_folder()}/ablation.md, .csv and .tex.")
    with tracked(cfg, job_folder()) as tracker:
        log_table(tracker, "ablation", table)


def _job(cfg: DictConfig, model: str, method: str, training: int) -> Job:
    """The job of one training of a model, whose prompts are those of cfg.model's tier."""
    job = configuration(cfg, {"model": model, "method": method, "training": training})
    if job.model.tier != cfg.model.tier:
        raise ValueError(
            f"{model} is of the tier {job.model.tier}, but the data of the tier {cfg.model.tier}: "
            f"set model={model}, and only models of its tier"
        )
    return Job(job)


def _table(cfg: DictConfig, samples: pd.DataFrame) -> Table:
    """One row a model; samples: rows of `sample_scores`, of which those count that all models
    answered under a method."""
    models, methods = list(cfg.stage.models), list(cfg.stage.methods)
    found = {}
    for method in methods:
        here = samples[samples["method"] == method]
        found[method] = resample(here, SCORERS[0], ["model"], shared=True)
    rows = []
    for model in models:
        row = [model]
        for method in methods:
            own, first = (100 * found[method].mean((name,)) for name in (model, models[0]))
            gain = Estimate.of(own - first)
            row += [number(own[0]), "" if model == models[0] else interval(gain)]
        rows.append(tuple(row))
    names = [name for m in methods for name in (METHODS.get(m, m), f"Δ {METHODS.get(m, m)}")]
    return Table.described(
        "ablation",
        ("Model", *names),
        rows,
        group=0,
        budget=str(cfg.budget),
        tier=cfg.model.tier,
        count=len(cfg.data.tasks),
        first_model=models[0],
        n=min(np.min(of.counts) for of in found.values()),
        seed=cfg.seed,
        trainings=trainings_of(samples),
        first_token=cfg.stage.first_token,
    )
