"""One backbone alone beside a paper's table: are its settings and tasks in the paper's order?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import RESAMPLES, resample
from ratplus_exp.analysis.frame import setting_of_paper
from ratplus_exp.analysis.pattern import PAPER_SETTING, correlation

SOLVED = 50.0
"""Dense accuracy in percent, below which a task has little to lose."""


def rank_agreement(
    paper: pd.DataFrame, samples: pd.DataFrame, score: str, n_boot: int = RESAMPLES
) -> pd.DataFrame:
    """Spearman's correlation of the paper's accuracies with measured ones.

    Over settings it is that of the means over tasks; over tasks that of the means over settings,
    less dense where measured (the paper's models solve every task without a method).

    Args:
        paper: one backbone's rows of a table of `paper_tables`.
        samples: the same backbone's rows of `sample_scores`, dense among them.
        score: column of `samples` to compare.

    Returns:
        over, tasks (in the paper's order), count (of settings or tasks), value, low, high (over
        samples; NaN for few), for all tasks and for those SOLVED when dense; no rows where dense is
        missing.
    """
    ours = setting_of_paper(samples[samples["selector"].isin(paper["selector"])])
    found = resample(ours, score, PAPER_SETTING, n_boot=n_boot)
    printed = setting_of_paper(paper).set_index([*PAPER_SETTING, "task"])["accuracy"]
    dense, none = ("dense", "1", 0), pd.DataFrame(columns=_COLUMNS)
    if dense not in found.groups:
        return none
    # Of the tasks that dense has, and the settings that have all of them.
    order = [t for t in dict.fromkeys(paper["task"]) if np.isfinite(found.mean(dense, [t])[0])]
    values = 100 * found.values[:, [found.tasks.index(t) for t in order]]
    whole = {s for s, i in found.groups.items() if np.isfinite(values[0, :, i]).all()}
    settings = [s for s in dict.fromkeys(x[:-1] for x in printed.index) if s in whole]
    if not settings:
        return none
    values = values[:, :, [found.groups[s] for s in (dense, *settings)]]
    theirs = np.array([[printed[(*s, t)] for s in settings] for t in order])
    rows = []
    for here in (np.full(len(order), True), values[0, :, 0] >= SOLVED):
        if not here.any():
            break
        mine, lost = values[:, here, 1:], values[:, here, 1:] - values[:, here, :1]
        for over, a, b in (
            ("settings", mine.mean(1), theirs[here].mean(0)),
            ("tasks", lost.mean(2), theirs[here].mean(1)),
        ):
            tasks = tuple(t for t, on in zip(order, here, strict=True) if on)
            rows.append({"over": over, "tasks": tasks, "count": len(b), **vars(correlation(a, b))})
    return pd.DataFrame(rows, columns=_COLUMNS)


_COLUMNS = ["over", "tasks", "count", "value", "low", "high"]
