"""stage=random_selector: H2 for one model, method and budget, a sweep with a table of its own.

The selector is swapped for a uniformly random one of equal size and nothing else: forced candidates
are kept, Quest draws anew at every decoding step, layer and head, SnapKV once after the prompt,
MoBA for every prompt token. Beside it the method's own choice, and an oracle that always selects
what holds the gold values. The cells are those of stage=eval with selector=random and so on, so
that Tables 2 and 5 share them.
"""

from __future__ import annotations

from omegaconf import DictConfig

from ratplus_exp.analysis import SCORERS, mean_std, tidy
from ratplus_exp.config import validate_method
from ratplus_exp.report import Table
from ratplus_exp.report.prose import plus_minus
from ratplus_exp.stages.common import model_name
from ratplus_exp.stages.sweep import run_table
from ratplus_exp.store import Cell


def run(cfg: DictConfig) -> None:
    """Run the cells that are missing, and print and write mean ± std over the seeds."""
    if validate_method(cfg).phase is None:
        raise ValueError(
            f"stage=random_selector needs a method that selects, not {cfg.method.name}: "
            "use quest, moba or snapkv"
        )
    cfg = cfg.copy()
    cfg.stage.models = []  # one model, whatever the pair
    run_table(cfg, _table)


def _table(cfg: DictConfig, stored: list[Cell]) -> Table:
    """One row a selector, a column a task."""
    cells = tidy(stored)
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
