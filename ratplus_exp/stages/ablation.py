"""stage=ablation: several models, for instance variants of one, side by side at one budget.

Means over the tasks, dense and under each method, and how far each model is from the first one. The
cells are those of stage=eval.
"""

from __future__ import annotations

import pandas as pd
from omegaconf import DictConfig

from ratplus_exp.results import Table, sample_scores
from ratplus_exp.results.labels import METHODS, first_token_note, measured_at
from ratplus_exp.results.layout import number
from ratplus_exp.results.stats import paired_bootstrap
from ratplus_exp.stages.cells import Job
from ratplus_exp.stages.common import job_folder
from ratplus_exp.stages.sweep import configuration, fill_jobs, refuse
from ratplus_exp.tracking import log_table, tracked


def run(cfg: DictConfig) -> None:
    """Run the cells that are missing, and print and write the table."""
    if len(cfg.stage.models) < 2:
        raise ValueError("stage=ablation compares models: set stage.models=[first,second]")
    jobs = {
        (model, method): Job(configuration(cfg, {"model": model, "method": method}))
        for model in cfg.stage.models
        for method in cfg.stage.methods
    }
    refuse(fill_jobs(cfg, list(jobs.values())))
    store = next(iter(jobs.values())).store
    cells = {key: [cell.id for cell in job.cells.values()] for key, job in jobs.items()}
    samples = sample_scores(store, cell=[name for names in cells.values() for name in names])
    table = _table(cfg, cells, samples)
    table.write(job_folder(), "ablation")
    print(table.to_text())
    print(f"Written to {job_folder()}/ablation.md, .csv and .tex.")
    with tracked(cfg, job_folder()) as tracker:
        log_table(tracker, "ablation", table)


def _table(
    cfg: DictConfig, cells: dict[tuple[str, str], list[str]], samples: pd.DataFrame
) -> Table:
    """One row a model; samples: rows of `sample_scores`."""
    models, methods = list(cfg.stage.models), list(cfg.stage.methods)
    scores = {
        key: samples[samples["cell"].isin(ids)].set_index(["task", "id"])["score_p2"]
        for key, ids in cells.items()
    }
    rows = []
    for model in models:
        row = [model]
        for method in methods:
            own, first = scores[model, method], scores[models[0], method]
            row.append(number(100 * own.groupby("task").mean().mean()))
            if model == models[0]:
                row.append("")
            else:
                gain, low, high = (100 * x for x in paired_bootstrap(own, first))
                row.append(f"{number(gain, sign='+')} [{number(low)}, {number(high)}]")
        rows.append(tuple(row))
    of_a_task = samples.groupby(["cell", "task"]).size()
    columns = [name for m in methods for name in (METHODS.get(m, m), f"Δ {METHODS.get(m, m)}")]
    return Table(
        title=f"Budget {cfg.budget.fraction}, at {measured_at(cfg.model.tier)}",
        caption=(
            f"Mean accuracy in % over {len(cfg.data.tasks)} tasks by P2's score; Δ: points more "
            f"than {models[0]}, with a 95 % bootstrap interval over samples, paired by id. n = "
            f"{of_a_task.min()} samples a task, seed {cfg.seed}. Each model was trained once. "
            f"{first_token_note(cfg.stage.first_token)}"
        ),
        columns=("Model", *columns),
        rows=tuple(rows),
    )
