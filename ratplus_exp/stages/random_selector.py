"""stage=random_selector: H2 for one model, method and budget.

The selector is swapped for a uniformly random one of equal size and nothing else: forced candidates
are kept, Quest draws anew at every decoding step, layer and head, SnapKV once after the prompt,
MoBA for every prompt token. Beside it the method's own choice, and an oracle that always selects
what holds the gold values. The cells are those of stage=eval with selector=random and so on, so
that Tables 2 and 5 share them.
"""

from __future__ import annotations

import pandas as pd
from omegaconf import DictConfig

from ratplus_exp.analysis import SCORERS, mean_std, tidy
from ratplus_exp.config import validate_method
from ratplus_exp.report import Table
from ratplus_exp.report.prose import plus_minus
from ratplus_exp.stages.common import job_folder, model_name
from ratplus_exp.stages.sweep import complete, configuration, job_of
from ratplus_exp.tracking import log_table, tracked


def run(cfg: DictConfig) -> None:
    """Run the cells that are missing, and print and write mean ± std over the seeds."""
    if validate_method(cfg).phase is None:
        raise ValueError(
            f"stage=random_selector needs a method that selects, not {cfg.method.name}: "
            "use quest, moba or snapkv"
        )
    entries = [{"selector": "random", "selector_seed": seed} for seed in cfg.stage.selector_seeds]
    entries += [{"selector": "topk"}, {"selector": "oracle"}]
    jobs = [job_of(configuration(cfg, entry)) for entry in entries]
    complete(cfg, jobs)
    ids = [cell.id for job in jobs for cell in job.cells.values()]
    cells = tidy(jobs[0].store)
    table = _table(cfg, cells[cells["cell"].isin(ids)])
    table.write(job_folder(), "random_selector")
    print(table.to_text())
    print(f"Written to {job_folder()}/random_selector.md, .csv and .tex.")
    with tracked(cfg, job_folder()) as tracker:
        log_table(tracker, "random_selector", table)


def _table(cfg: DictConfig, cells: pd.DataFrame) -> Table:
    """One row a selector, a column a task."""
    tasks = list(cfg.data.tasks)
    rows = []
    for name, side in cells.groupby("selector", sort=False):
        wide = side.pivot(index="selector_seed", columns="task", values=SCORERS[0])[tasks]
        columns = [*(wide[task] for task in tasks), wide.mean(axis=1)]
        texts = [plus_minus(*mean_std(column)) for column in columns]
        rows.append((str(name), *texts, str(side["n"].min()), str(len(wide))))
    order = ["random", "topk", "oracle"]
    rows.sort(key=lambda row: order.index(row[0]))
    first = cells.iloc[0]
    return Table(
        title=f"{model_name(cfg)}, {cfg.method.name} at budget {first['budget']}: who selects",
        caption=(
            "Accuracy in % by exact match; ± is the standard deviation over selector seeds. "
            "random: as many candidates, uniformly, forced ones kept; oracle: what holds the gold "
            "values first, then the method's choice. n: samples a task and seed."
        ),
        columns=("Selector", *tasks, "Mean", "n", "seeds"),
        rows=tuple(rows),
    )
