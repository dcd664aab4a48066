"""stage=ablation: several models, for instance variants of one, side by side at one budget.

Means over the tasks, dense and under each method, and how far each model is from the first one. The
cells are those of stage=eval.
"""

from __future__ import annotations

import pandas as pd
from omegaconf import DictConfig, ListConfig

from ratplus_exp.results import Table, sample_scores
from ratplus_exp.results.labels import METHODS, first_token_note, measured_at
from ratplus_exp.results.layout import number
from ratplus_exp.results.stats import paired_bootstrap
from ratplus_exp.stages.cells import Job
from ratplus_exp.stages.common import job_folder
from ratplus_exp.stages.sweep import complete, configuration
from ratplus_exp.tracking import log_table, tracked


def run(cfg: DictConfig) -> None:
    """Run the cells that are missing, and print and write the table."""
    for field, least, example in (("models", 2, "first,second"), ("methods", 1, "quest")):
        names = cfg.stage[field]
        if not isinstance(names, ListConfig) or len(names) < least:
            raise ValueError(f"stage=ablation compares models: set stage.{field}=[{example}]")
    jobs = {
        (model, method): _job(cfg, model, method)
        for model in cfg.stage.models
        for method in cfg.stage.methods
    }
    complete(cfg, list(jobs.values()))
    store = next(iter(jobs.values())).store
    cells = {key: [cell.id for cell in job.cells.values()] for key, job in jobs.items()}
    samples = sample_scores(store, cell=[name for names in cells.values() for name in names])
    table = _table(cfg, cells, samples)
    table.write(job_folder(), "ablation")
    print(table.to_text())
    print(f"Written to {job_folder()}/ablation.md, .csv and .tex.")
    with tracked(cfg, job_folder()) as tracker:
        log_table(tracker, "ablation", table)


def _job(cfg: DictConfig, model: str, method: str) -> Job:
    """The job of one model, whose prompts are those of cfg.model's tier."""
    job = configuration(cfg, {"model": model, "method": method})
    if job.model.tier != cfg.model.tier:
        raise ValueError(
            f"{model} is of the tier {job.model.tier}, but the data of the tier {cfg.model.tier}: "
            f"set model={model}, and only models of its tier"
        )
    return Job(job)


def _table(
    cfg: DictConfig, cells: dict[tuple[str, str], list[str]], samples: pd.DataFrame
) -> Table:
    """One row a model; samples: rows of `sample_scores`."""
    models, methods = list(cfg.stage.models), list(cfg.stage.methods)
    scores = {}
    for method in methods:  # a column a model, a row a sample that all of them answered
        sides = (samples[samples["cell"].isin(cells[model, method])] for model in models)
        columns = [side.set_index(["task", "id"])["score_p2"] for side in sides]
        scores[method] = pd.concat(columns, axis=1, keys=models).dropna()
    n = min(frame.groupby("task").size().min() for frame in scores.values())
    rows = []
    for model in models:
        row = [model]
        for method in methods:
            own, first = scores[method][model], scores[method][models[0]]
            row.append(number(100 * own.groupby("task").mean().mean()))
            if model == models[0]:
                row.append("")
            else:
                gain, low, high = (100 * x for x in paired_bootstrap(own, first))
                row.append(f"{number(gain, sign='+')} [{number(low)}, {number(high)}]")
        rows.append(tuple(row))
    names = [name for m in methods for name in (METHODS.get(m, m), f"Δ {METHODS.get(m, m)}")]
    where = measured_at(cfg.model.tier, cfg.stage.first_token)
    return Table(
        title=f"Budget {cfg.budget.fraction}, at {where}",
        caption=(
            f"Mean accuracy in % over {len(cfg.data.tasks)} tasks by P2's score; Δ: points more "
            f"than {models[0]}, with a 95 % bootstrap interval over samples, paired by id. n = "
            f"{n} samples a task or more, seed {cfg.seed}. Each model was trained once. "
            f"{first_token_note(cfg.stage.first_token)}"
        ),
        columns=("Model", *names),
        rows=tuple(rows),
    )
