"""stage=ablation: several models, for instance variants of one, side by side at one budget; a
sweep with a table of its own.

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
from ratplus_exp.stages.common import first_token_of
from ratplus_exp.stages.sweep import run_table


def run(cfg: DictConfig) -> None:
    """Run the cells that are missing, and print and write the table."""
    run_table(cfg, lambda _, cells: _table(cfg, sample_scores(cells)))


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
        first_token=first_token_of(cfg),
    )
